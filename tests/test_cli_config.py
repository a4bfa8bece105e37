# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Configuration files: where they are looked for, what may stand in them,
which setting wins, and how they are shown.
"""

import contextlib
import io
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import tarsnap                                              # noqa: E402
import world                                                # noqa: E402

# Contract 2.3.
WITH_ARGUMENT = {
    'cachedir': '/d', 'checkpoint-bytes': '1G', 'disk-pause': '10',
    'exclude': 'x', 'include': 'x', 'keyfile': '/k', 'maxbw': '1G',
    'maxbw-rate': '8000', 'maxbw-rate-down': '8000', 'maxbw-rate-up': '8000',
    'passphrase': 'env:X', 'progress-bytes': '1k', 'snaptime': '/'}
FLAGS = '''aggressive-networking force-resources humanize-numbers
    insane-filesystems iso-dates lowmem noatime nodump normalmem print-stats
    quiet retry-forever store-atime totals verylowmem'''.split()
NEGATIVE = '''no-aggressive-networking no-config-exclude no-config-include
    no-disk-pause no-force-resources no-humanize-numbers no-insane-filesystems
    no-iso-dates no-maxbw no-maxbw-rate-down no-maxbw-rate-up no-noatime
    no-nodump no-print-stats no-progress-bytes no-quiet no-retry-forever
    no-snaptime no-store-atime no-totals'''.split()
NEVER = '''archive-names configfile creationtime csv-file dry-run
    dry-run-metadata dump-config hashes keep-going keep-newer-files
    noisy-warnings no-default-config null null-input null-output
    numeric-owner one-file-system resume-extract strip-components chroot
    c f v P L H C insecure directory passphrase-stdin create version help
    --quiet Quiet QUIET'''.split()

# (rule, text of the file, fields of Settings)
SYNTAX = [
    ('leading blanks', b'  \tquiet\n', {'quiet': True}),
    ('blank lines', b'\n  \n\t\nquiet\n\n', {'quiet': True}),
    ('comment', b'# quiet\n  # quiet\n', {'quiet': False}),
    ('no trailing comment', b'exclude a # b\n', {'exclude': [b'a # b']}),
    ('several blanks before the argument', b'keyfile \t  /k\n',
     {'keyfile': '/k'}),
    ('a tab before the argument', b'exclude\ta b\tc\n',
     {'exclude': [b'a b\tc']}),
    ('inner blanks kept', b'exclude a  b\tc\n', {'exclude': [b'a  b\tc']}),
    ('trailing blanks of a flag', b'quiet  \n', {'quiet': True}),
    ('no newline at the end', b'exclude a', {'exclude': [b'a']}),
    ('\\r ends a line', b'quiet\rexclude a\r',
     {'quiet': True, 'exclude': [b'a']}),
    ('\\r\\n ends a line', b'quiet\r\nexclude a\r\n',
     {'quiet': True, 'exclude': [b'a']}),
    ('bytes of no encoding', b'exclude \xff\xc3\xbc\n',
     {'exclude': [b'\xff\xc3\xbc']}),
    ('~ is home', b'keyfile ~/k\n', {'keyfile': '/home/of/passwd/k'}),
    ('~ inside is none', b'keyfile /a~/k\n', {'keyfile': '/a~/k'}),
    ('first wins within a file', b'keyfile /a\nkeyfile /b\n',
     {'keyfile': '/a'}),
    ('no-X claims', b'no-quiet\nquiet\n', {'quiet': False}),
    ('X claims', b'quiet\nno-quiet\n', {'quiet': True}),
    ('print-stats claims', b'print-stats\nno-print-stats\n',
     {'print_stats': True}),
    ('no-print-stats claims', b'no-print-stats\nprint-stats\n',
     {'print_stats': False}),
    ('exclude adds up', b'exclude a\ninclude b\nexclude c\n',
     {'exclude': [b'a', b'c'], 'include': [b'b']}),
    ('no-config-exclude is for later files', b'no-config-exclude\nexclude a\n',
     {'exclude': [b'a']}),
    ('file of the NixOS module',
     b'\n  cachedir /c\n  keyfile /k\n\n  nodump\n  print-stats\n'
     b'  humanize-numbers\n  checkpoint-bytes 1GB\n  exclude *.o\n\n',
     {'cachedir': '/c', 'keyfile': '/k', 'print_stats': True,
      'humanize_numbers': True, 'checkpoint_bytes': 10 ** 9,
      'exclude': [b'*.o']}),
    ('server', b'server [::1]:9279\n', {'server': '[::1]:9279'}),
    ('compression', b'compression 9\n', {'compression': 9}),
    ('compression none', b'compression none\n', {'compression': 0}),
    ('an empty file', b'', {}),
]

# (rule, text, what is said after FILE:LINE: )
WRONG = [
    ('unknown', b'\nbogus x\n', '2: unknown directive: bogus'),
    ('unknown, case matters', b'Quiet\n', '1: unknown directive: Quiet'),
    ('no prefixes', b'qui\n', '1: unknown directive: qui'),
    ('no equals sign', b'keyfile=/k\n', '1: unknown directive: keyfile=/k'),
    ('missing argument', b'keyfile\n', '1: keyfile needs an argument'),
    ('missing argument, blanks', b'keyfile \t\n',
     '1: keyfile needs an argument'),
    ('argument to a flag', b'quiet yes\n', '1: quiet takes no argument'),
    ('wrong size', b'checkpoint-bytes 1KiB\n', 'checkpoint-bytes: Not a size'),
    ('wrong method', b'passphrase dev:null\n',
     'passphrase: Invalid passphrase method'),
    ('binary file', bytes(range(128, 140)) * 9, '1: unknown directive'),
]


class ConfigTest(unittest.TestCase):

    def setUp(self):
        self.root = tempfile.mkdtemp(prefix='config-')
        self.addCleanup(shutil.rmtree, self.root, True)

    def file(self, name, text):
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path

    def settings(self, *words, home='/home/of/passwd', system=()):
        """(Settings, stderr) of a command line with its files read."""
        said = io.StringIO()
        entry = mock.Mock(pw_dir=home)
        with contextlib.redirect_stderr(said), \
                mock.patch.object(tarsnap, 'SYSTEM_CONFIGS', system), \
                mock.patch.object(pwd, 'getpwuid', return_value=entry):
            parser = tarsnap.Parser(words)
            opt = parser.parse()
            parser.config_defaults()
        return opt, said.getvalue()

    def run_it(self, *words, environment=None):
        return subprocess.run(
            [sys.executable, world.Programs.path('tarsnap'), *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=dict(
                {'PATH': os.environ['PATH'], 'LANG': 'C'},
                **(environment or {})))


class Syntax(ConfigTest):
    """Contract 2.2."""

    def test_rules(self):
        for rule, text, fields in SYNTAX:
            with self.subTest(rule):
                path = self.file('conf', text)
                opt, said = self.settings('--no-default-config',
                                          '--configfile', path, '-c')
                self.assertEqual(said, '')
                self.assertEqual({name: getattr(opt, name)
                                  for name in fields}, fields)

    def test_trailing_blanks_are_kept_and_warned_about(self):
        path = self.file('conf', 'exclude a \t\n')
        opt, said = self.settings('--configfile', path, '-c')
        self.assertEqual(opt.exclude, [b'a \t'])
        self.assertRegex(said, '^tarsnap: %s:1: blanks' % path)

    def test_wrong(self):
        for rule, text, says in WRONG:
            with self.subTest(rule):
                path = self.file('conf', text)
                with self.assertRaises(tarsnap.UserError) as caught:
                    self.settings('--configfile', path, '-c')
                self.assertIn(path + ':', str(caught.exception))
                self.assertIn(says, str(caught.exception))

    def test_one_line_and_exit_1(self):
        path = self.file('conf', b'bogus\xff\n')
        for words in (['-c', '-f', 'x', 'y'], ['--verify-config']):
            done = self.run_it('--no-default-config', '--configfile', path,
                               *words)
            self.assertEqual((done.returncode, done.stdout), (1, b''))
            self.assertEqual(
                done.stderr, b'tarsnap: %s:1: unknown directive: bogus\xff\n'
                % path.encode())


class Directives(ConfigTest):
    """Contract 2.3."""

    def test_all_of_the_contract(self):
        there = set(tarsnap.Parser([]).directives)
        wanted = set(WITH_ARGUMENT) | set(FLAGS) | set(NEGATIVE)
        self.assertEqual(wanted - there, set())
        # What is ours on top has no negative form that upstream has not.
        for name in ('no-checkpoint-bytes', 'no-maxbw-rate', 'no-lowmem'):
            self.assertNotIn(name, there)

    def test_command_line_only(self):
        for name in NEVER:
            with self.subTest(name):
                path = self.file('conf', name + '\n')
                with self.assertRaisesRegex(tarsnap.UserError,
                                            'unknown directive'):
                    self.settings('--configfile', path, '-c')

    def test_each_is_taken_and_the_wrong_mode_ignored(self):
        modes = {'c': '-c', 't': '-t', 'd': '-d', 'a': '--list-archives',
                 'n': '--nuke', 's': '--print-stats'}
        for name, row in tarsnap.Parser([]).directives.items():
            argument = '' if not row.arg or name == 'no-' + row.name else \
                ' ' + WITH_ARGUMENT.get(name, {'LEVEL': '1', 'SPAN': '1d'}
                                        .get(row.arg, '1'))
            path = self.file('conf', name + argument + '\n')
            for letter, mode in modes.items():
                with self.subTest(name, mode=mode):
                    opt, said = self.settings('--configfile', path, mode)
                    self.assertEqual(said, '')
                    counts = not row.modes or letter in row.modes
                    self.assertEqual(
                        opt.set_by.get(row.field) not in (
                            None, tarsnap.COMMAND_LINE), counts)

    def test_print_stats_is_for_c_and_d_only(self):
        path = self.file('conf', 'no-print-stats\n')
        opt, _ = self.settings('--configfile', path, '--print-stats')
        self.assertEqual((opt.letter, opt.print_stats), ('s', True))
        path = self.file('conf', 'print-stats\n')
        for words, wanted in ((['-c'], True), (['-d'], True), (['-t'], False),
                              (['-c', '--no-print-stats'], False)):
            opt, _ = self.settings('--configfile', path, *words)
            self.assertEqual(opt.print_stats, wanted, words)


class Compression(ConfigTest):
    """Our own directive: none, 1 to 9."""

    def test_sizes(self):
        # What deflates better the more is tried, whatever the padding adds; a
        # dry run says how well.
        with open(tarsnap.__file__, 'rb') as file:
            tree = self.file('tree/source', file.read())
        sizes = []
        for level in ('none', '1', '9'):
            path = self.file('conf', 'compression %s\nprint-stats\n' % level)
            done = self.run_it('--no-default-config', '--configfile', path,
                               '-c', '--dry-run', '-C', self.root, 'tree')
            self.assertEqual(done.returncode, 0, done)
            sizes.append(int(re.search(rb'(?m)^New data +\d+ +(\d+)$',
                                       done.stderr)[1]))
        self.assertGreater(sizes[0], os.path.getsize(tree))
        self.assertGreater(sizes[0], 2 * sizes[1])
        self.assertGreater(sizes[1], sizes[2])


class Order(ConfigTest):
    """Contract 2.1: the first setting wins."""

    def places(self):
        """The files in their order, each with its own keyfile."""
        names = ['one', 'two', 'home/.tarsnaprc', 'xdg/tarsnap/tarsnap.conf',
                 'usr', 'etc']
        return [self.file(name, 'keyfile /%d\nexclude %d\ninclude i%d\n'
                          % (number, number, number))
                for number, name in enumerate(names)]

    def read(self, *words):
        with mock.patch.dict(os.environ, XDG_CONFIG_HOME=os.path.join(
                self.root, 'xdg')):
            return self.settings(
                *words, home=os.path.join(self.root, 'home'),
                system=(os.path.join(self.root, 'usr'),
                        os.path.join(self.root, 'etc')))[0]

    def test_each_in_its_turn(self):
        places = self.places()
        given = ['--configfile', places[0], '--configfile', places[1]]
        opt = self.read(*given, '-c', '--keyfile', '/c', '--exclude', 'c')
        self.assertEqual(opt.keyfile, '/c')
        self.assertEqual(opt.exclude, [b'c', b'0', b'1', b'2', b'3', b'4',
                                       b'5'])
        for number, place in enumerate(places):
            with self.subTest(place):
                opt = self.read(*given, '-c')
                self.assertEqual(opt.keyfile, '/%d' % number)
            os.unlink(place)
            if place in given:
                at = given.index(place)
                del given[at - 1:at + 1]
        self.assertIsNone(self.read('-c').keyfile)

    def test_no_default_config(self):
        places = self.places()
        opt = self.read('--no-default-config', '--configfile', places[1],
                        '-c')
        self.assertEqual((opt.keyfile, opt.exclude), ('/1', [b'1']))

    def test_without_xdg(self):
        self.file('home/.config/tarsnap/tarsnap.conf', 'keyfile /x\n')
        for value in (None, ''):
            with mock.patch.dict(os.environ):
                os.environ.pop('XDG_CONFIG_HOME', None)
                if value is not None:
                    os.environ['XDG_CONFIG_HOME'] = value
                opt, _ = self.settings('-c', home=os.path.join(self.root,
                                                               'home'))
                self.assertEqual(opt.keyfile, '/x')

    def test_no_config_exclude(self):
        places = self.places()
        for what, other in (('exclude', 'include'), ('include', 'exclude')):
            opt = self.read('-c', '--no-config-' + what, '--' + what, 'mine')
            self.assertEqual(getattr(opt, what), [b'mine'])
            self.assertEqual(len(getattr(opt, other)), 4)
            # In a file: for those after it.
            with open(places[2], 'rb') as file:
                saved = file.read()
            self.file('home/.tarsnaprc', b'no-config-%s\n' % what.encode()
                      + saved)
            opt = self.read('-c', '--configfile', places[0])
            self.assertEqual(len(getattr(opt, what)), 2)
            self.assertEqual(len(getattr(opt, other)), 5)
            self.file('home/.tarsnaprc', saved)

    def test_no_claims_across_files(self):
        self.file('home/.tarsnaprc', 'no-quiet\n')
        self.file('etc', 'quiet\n')
        self.assertFalse(self.read('-c').quiet)

    def test_missing(self):
        # A file that was asked for must be there, a default one not.
        for path, says in ((os.path.join(self.root, 'none'), b'No such file'),
                           (self.root, b'Is a directory')):
            done = self.run_it('--configfile', path, '--verify-config')
            self.assertEqual(done.returncode, 1)
            self.assertEqual(len(done.stderr.splitlines()), 1)
            self.assertIn(path.encode() + b': ' + says, done.stderr)

    def test_home_is_of_the_password_database(self):
        # As under sudo; and HOME need not be set at all.
        self.file('fake/.tarsnaprc', 'bogus\n')
        fake = os.path.join(self.root, 'fake')
        for environment in ({'HOME': fake}, {}):
            done = self.run_it('--verify-config', environment=environment)
            self.assertEqual((done.returncode, done.stderr), (0, b''))

    def test_user_without_an_entry(self):
        with mock.patch.object(pwd, 'getpwuid', side_effect=KeyError), \
                mock.patch.dict(os.environ):
            os.environ.pop('HOME', None)
            self.assertEqual(tarsnap.home_directory(), '/')


class Shown(ConfigTest):
    """Contract 2.4."""

    def test_verify_config(self):
        path = self.file('conf', 'cachedir /none/such\nkeyfile /none\n'
                         'passphrase env:NONE\nexclude a\n')
        done = self.run_it('--no-default-config', '--configfile', path,
                           '--verify-config')
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (0, b'', b''))
        self.assertFalse(os.path.exists('/none'))

    def test_verify_config_looks_at_what_is_for_other_modes(self):
        for line in ('checkpoint-bytes 1', 'disk-pause x', 'maxbw 1KiB',
                     'keep-within 3', 'compression 11', 'progress-bytes 1'):
            with self.subTest(line):
                path = self.file('conf', line + '\n')
                done = self.run_it('--no-default-config', '--configfile',
                                   path, '--verify-config')
                self.assertEqual((done.returncode, done.stdout), (1, b''))
                self.assertTrue(done.stderr.startswith(
                    b'tarsnap: %s:1: %s: ' % (
                        path.encode(), line.split()[0].encode())), done)
        # A file that is made for each run need not be there; no mode is
        # chosen yet in which this would be too much.
        path = self.file('conf', 'snaptime /none/such\nlowmem\nprint-stats\n'
                         'maxbw 1M\nno-snaptime\nverylowmem\nkeep-daily 3\n'
                         'aggressive-networking\nmaxbw-rate 1e6\n'
                         'exclude a\nno-config-exclude\n')
        done = self.run_it('--no-default-config', '--configfile', path,
                           '--verify-config')
        self.assertEqual((done.returncode, done.stderr), (0, b''))

    def test_verify_config_takes_neither_names_nor_operands(self):
        for words in (['-f', 'a'], ['a']):
            done = self.run_it('--no-default-config', '--verify-config',
                               *words)
            self.assertEqual(done.returncode, 1)
            self.assertIn(b'--verify-config', done.stderr)

    def test_dump_config(self):
        one = self.file('one', '\n  # what\nexclude  \xfc b\n\n  quiet\n')
        two = self.file('two', 'keyfile /none\n')
        words = ['--no-default-config', '--configfile', one, '--configfile',
                 two, '--dump-config']
        done = self.run_it(*words)
        self.assertEqual((done.returncode, done.stdout), (0, b''))
        lines = done.stderr.decode().splitlines()
        self.assertRegex(lines[1], r'^  .*tarsnap\.pyc? %s$' % ' '.join(words))
        self.assertEqual([line for line in lines if line[:1] != ' '], [
            'Command line:', 'Configuration file %s:' % one,
            'Configuration file %s:' % two])
        self.assertEqual([line for line in lines[2:] if line[:1] == ' '], [
            '  # what', '  exclude  \xfc b', '  quiet', '  keyfile /none'])

    def test_dump_config_before_an_error(self):
        path = self.file('conf', 'quiet\nbogus\n')
        done = self.run_it('--no-default-config', '--configfile', path,
                           '--dump-config', '-t', '-f', 'a')
        self.assertEqual(done.returncode, 1)
        lines = done.stderr.decode().splitlines()
        self.assertEqual(lines[-1], 'tarsnap: %s:2: unknown directive: bogus'
                         % path)
        self.assertIn('  bogus', lines)


if __name__ == '__main__':
    unittest.main()
