# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The rules that hold for all four key tools, and key files that have a
passphrase in the hands of tarsnap itself.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import keygen
import samples
import tarsnap
import test_keygen
import world
from test_keygen import drive

TOOLS = {'keygen': (keygen.keygen_main, keygen.KEYGEN_OPTIONS),
         'keyregen': (keygen.keyregen_main, keygen.KEYREGEN_OPTIONS),
         'keymgmt': (keygen.keymgmt_main, keygen.KEYMGMT_OPTIONS),
         'recrypt': (keygen.recrypt_main, keygen.RECRYPT_OPTIONS)}
NEEDED = {'keygen': ('--keyfile', '--machine', '--server', '--user'),
          'keyregen': ('--keyfile', '--oldkey', '--machine'),
          'keymgmt': ('--outkeyfile',),
          'recrypt': ('--oldkey', '--oldcachedir', '--newkey',
                      '--newcachedir')}


class Rules(test_keygen.ToolTest):
    """CLI 4.1, below its table of options."""

    def usage(self, name, words, says):
        with tempfile.TemporaryFile('w+') as stderr, \
                mock.patch.object(sys, 'stderr', stderr):
            self.assertEqual(TOOLS[name][0](words), 1, words)
            stderr.seek(0)
            text = stderr.read()
        self.assertTrue(text.startswith('tarsnap-%s: %s' % (name, says)),
                        text)
        self.assertIn('\nusage: tarsnap-%s ' % name, text)
        self.assertEqual(os.listdir(self.temp), [])

    def words(self, name, without=()):
        """A command line that lacks nothing, and would change nothing."""
        values = {'--server': 'localhost:1', '--machine': 'm', '--user': 'u'}
        words = [word for option in NEEDED[name] if option not in without
                 for word in (option, values.get(option, self.path))]
        return words + ['-r', 'in.key'] * (name == 'keymgmt')

    def test_version_to_stderr(self):
        for name in TOOLS:
            with self.subTest(name):
                done = self.run_tool(test_keygen.KEYGEN[:-1]
                                     + [name, '--version'])
                self.assertEqual(
                    (done.returncode, done.stdout, done.stderr.decode()),
                    (0, b'', 'tarsnap-%s %s\n' % (name, tarsnap.VERSION)))

    def test_without_a_tools_name_it_is_keygen(self):
        done = self.run_tool(test_keygen.KEYGEN[:-1] + [
            '--keyfile', self.path, '--machine', 'm', '--server', './store'])
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(self.load().can(1))

    def test_required_options(self):
        for name, needed in NEEDED.items():
            for option in needed:
                with self.subTest(name, option=option):
                    self.usage(name, self.words(name, (option,)),
                               option + ' is missing')

    def test_single_options_are_not_repeated(self):
        for name, (_, table) in TOOLS.items():
            for option, kind in table.items():
                words = [option] + ['1'] * (kind == keygen.ONCE)
                with self.subTest(name, option=option):
                    if kind in (keygen.ONCE, keygen.FLAG):
                        self.usage(name, words * 2,
                                   option + ' is given twice')
                    else:
                        keygen.options_parse((words + ['1'] * (
                            kind == keygen.MANY)) * 2, table)

    def test_no_prefix_abbreviations(self):
        for name, (_, table) in TOOLS.items():
            for option in table:
                short = option[:-1]
                if option.startswith('--') and short not in table:
                    self.usage(name, [short] + self.words(name),
                               'Unknown option: ' + short)

    def test_value_in_the_next_word_or_after_equals(self):
        for _, table in TOOLS.values():
            for option, kind in table.items():
                if kind in (keygen.ONCE, keygen.MANY):
                    self.assertEqual(
                        keygen.options_parse([option, '-x=y'], table),
                        keygen.options_parse([option + '=-x=y'], table))

    def test_flags_bundle(self):
        key = samples.full_key()
        full = os.path.join(self.temp, 'full.key')
        tarsnap.key_write(tarsnap.key_create(full), key)
        for flags in itertools.chain.from_iterable(
                itertools.permutations('rwd', n) for n in (1, 2, 3)):
            found = []
            for words in (['-' + ''.join(flags)],
                          ['-' + flag for flag in flags]):
                self.assertEqual(keygen.keymgmt_main(
                    ['--outkeyfile', self.path, *words, full]), 0)
                found.append(tarsnap.key_encode(self.load()))
                os.unlink(self.path)
            self.assertEqual(found[0], found[1], flags)

    def test_passphrase_time(self):
        for text, seconds in (
                ('0.05', 0.05), ('86400', 86400), ('1', 1), ('.5', .5),
                ('2.', 2), ('1e3', 1000), ('0.049', None), ('86400.1', None),
                ('0', None), ('-1', None), ('', None), ('nan', None),
                ('inf', None), ('1_0', None), (' 1', None), ('1s', None)):
            with self.subTest(text):
                if seconds is None:
                    for name in ('keygen', 'keyregen', 'keymgmt'):
                        self.usage(name, ['--passphrased', '--passphrase-time',
                                          text] + self.words(name),
                                   '--passphrase-time: ')
                else:
                    self.assertEqual(keygen.seconds_parse(text, ''), seconds)

    def test_passphrase_mem(self):
        for text in ('1K', '1KiB', 'x', '', '-1', '1.5M', '1  k'):
            for name in ('keygen', 'keyregen', 'keymgmt'):
                with self.subTest(text):
                    self.usage(name, ['--passphrased', '--passphrase-mem',
                                      text] + self.words(name),
                               '--passphrase-mem: ')

    def test_mem_and_time_need_a_passphrase(self):
        for name in ('keygen', 'keyregen', 'keymgmt'):
            for words in (['--passphrase-mem', '1M'],
                          ['--passphrase-time', '1']):
                self.usage(name, words + self.words(name),
                           words[0] + ' needs --passphrased')

    def test_printing_stands_alone(self):
        for option, other in itertools.product(
                keygen.PRINTERS, [[printer, 'k'] for printer in
                                  keygen.PRINTERS] + [
                    ['--outkeyfile', self.path], ['-r'], ['--nuke'],
                    ['--passphrased'], ['--', 'k']]):
            if option != other[0]:
                with self.subTest(option, other=other[0]):
                    words = [option, 'in.key'] + other
                    first = [name for name in keygen.PRINTERS
                             if name in words][0]
                    self.usage('keymgmt', words, first + ' stands alone')

    def test_names_are_utf_8_whatever_the_locale(self):
        user = 'j\u00f6rg@example.org'
        self.assertEqual(keygen.name_check('--user', os.fsencode(user).decode(
            'ascii', 'surrogateescape'), False), user)
        for name in ('caf\u00e9', 'x\udcff', '\x1b[31m', '', 'a' * 256):
            self.assertRaises(keygen.Usage, keygen.name_check, '--machine',
                              name, True)
        for name in ('x\udcff', '\x1b[31m', '', '\u00f6' * 128):
            self.assertRaises(keygen.Usage, keygen.name_check, '--user',
                              name, False)

    def test_messages_in_any_encoding_and_on_one_line(self):
        for encoding in ('ascii', 'utf-16', 'utf-8'):
            done = self.run_tool(
                [sys.executable, keygen.__file__, 'keymgmt', '--print-key-id',
                 b'n\xc3\xb6\nne\xff'], PYTHONIOENCODING=encoding)
            self.assertEqual((done.returncode, done.stderr), (
                1, b'tarsnap-keymgmt: Cannot read key file n\xc3\xb6\\012ne'
                b'\xff: No such file or directory\n'))

    def test_one_passphrase_for_one_new_key_file(self):
        self.usage('keygen', ['--passphrase', 'env:A', '--new-passphrase',
                              'env:B'] + self.words('keygen'),
                   '--passphrase and')

    def test_methods_are_checked_before_anything_happens(self):
        for name in TOOLS:
            for option in ('--passphrase', '--new-passphrase'):
                words = self.words(name)
                done = self.run_tool(test_keygen.KEYGEN[:-1] + [
                    name, option, 'dev:null'] + words)
                with self.subTest(name, option=option):
                    self.assertEqual(done.returncode, 1)
                    self.assertEqual(
                        done.stderr.decode(), 'tarsnap-%s: Invalid passphrase '
                        'method: dev:null\n' % name)
                    self.assertEqual(os.listdir(self.temp), [])


class Streams(test_keygen.ToolTest):
    """What is closed is missed in words, and nothing else gets its place."""

    def closed(self, streams, *words):
        return self.run_tool(['sh', '-c', 'exec "$@" ' + streams, 'sh']
                             + test_keygen.KEYGEN[:-1] + list(words))

    def test_password(self):
        done = self.closed('<&-', 'keygen', '--keyfile', self.path,
                           '--machine', 'm', '--server', 'localhost:1',
                           '--user', 'u')
        self.assertEqual(done.returncode, 1)
        self.assertIn(b'No standard input', done.stderr)
        self.assertFalse(os.path.exists(self.path))

    def test_printing(self):
        self.make_key()
        done = self.closed('>&-', 'keymgmt', '--print-key-id', self.path)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b'Cannot write to standard output', done.stderr)

    def test_messages_never_land_in_a_key_file(self):
        """Which is the first file opened, and would be descriptor 2."""
        self.make_key()
        new = os.path.join(self.temp, 'cut.key')
        done = subprocess.run(
            ['sh', '-c', 'exec "$@" 2>&-', 'sh', *test_keygen.KEYMGMT,
             '--outkeyfile', new, '--passphrased', '--passphrase-time',
             '0.05', '-r', self.path], input=b'one\ntwo\nyes\nyes\n',
            start_new_session=True)
        self.assertEqual(done.returncode, 0)
        with open(new, 'rb') as file:
            self.assertEqual(file.readline().rstrip(), tarsnap.KEY_START)

    def test_progress(self):
        self.make_key()
        os.mkdir(os.path.join(self.temp, 'old'))
        words = ['recrypt', '--oldkey', self.path, '--oldcachedir', 'old',
                 '--newkey', 'heir', '--newcachedir', 'new']
        self.run_tool(test_keygen.KEYGEN[:-1] + [
            'keyregen', '--keyfile', 'heir', '--oldkey', self.path,
            '--machine', 'h'])
        done = self.closed('<&- >&-', *words)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b'Cannot write to standard output', done.stderr)
        done = self.run_tool(test_keygen.KEYGEN[:-1] + words)
        self.assertEqual((done.returncode, done.stderr), (0, b''))

    def make_key(self):
        done = self.run_tool(self.make('./store'))
        self.assertEqual(done.returncode, 0, done.stderr)


class StreamsOfTarsnap(unittest.TestCase):
    """The same of tarsnap: no traceback, and nothing half done."""

    def run_closed(self, w, streams, *words):
        return w.run(['sh', '-c', 'exec "$@" ' + streams, 'sh',
                      *w.argv(words)])

    def test_closed(self):
        w = world.World(self)
        w.keygen()
        world.write(w.path('file'), b'data')
        done = self.run_closed(w, '<&- >&- 2>&-', '-c', '-f', 'a', 'file')
        self.assertEqual(done.code, 0)
        self.assertEqual(w.names(), ['a'])
        for words in (['--list-archives'], ['--fsck'], ['--version'],
                      ['-t', '-f', 'a'], ['-r', '-f', 'a']):
            with self.subTest(words):
                done = self.run_closed(w, '<&- >&-', *words)
                self.assertEqual(done.code, 1)
                self.assertIn('Bad file descriptor', done.err)
                self.assertNotIn('Traceback', done.err)
        self.assertEqual(self.run_closed(w, '2>&-', '-c', '-x').code, 1)
        w.ok('--fsck')


class Locales(unittest.TestCase):
    """Paths are bytes: under any locale, whatever SQLite makes of them."""

    def test_odd_paths(self):
        for odd, locale in ((b'caf\xc3\xa9', 'C'),
                            (b'caf\xff %41?mode=x#', 'C.UTF-8')):
            with self.subTest(odd, locale=locale):
                self.whole_life(os.fsdecode(odd), locale)

    def whole_life(self, odd, locale):
        """Every tool, and what tarsnap does with its cache directory."""
        w = world.World(self)
        w.environment.update(LC_ALL=locale, PYTHONUTF8='0',
                             PYTHONCOERCECLOCALE='0')
        del w.environment['HOME']
        path = [w.path('%d' % number + odd) for number in range(6)]
        world.write(path[0], b'data')
        os.mkdir(path[2])
        for words in (
                ['keygen', '--keyfile', path[1], '--machine', 'm',
                 '--server', path[3]],
                ['keyregen', '--oldkey', path[1], '--keyfile', path[4],
                 '--machine', 'm']):
            done = w.tool(*words)
            self.assertEqual(done.code, 0, done)
            self.assertIn(path[3], done.err)
        for words in (['-c', '-f', odd, path[0]], ['--print-stats'],
                      ['--list-archives']):
            w.ok(*words, key=path[1], cache=path[2])
        done = w.tool('recrypt', '--oldkey', path[1], '--oldcachedir',
                      path[2], '--newkey', path[4], '--newcachedir', path[5])
        self.assertEqual(done.code, 0, done)
        done = w.ok('--list-archives', '--null-output', key=path[4],
                    cache=path[5])
        self.assertEqual(done.out, odd + '\0')


class Durable(test_keygen.ToolTest):
    def test_file_and_directory_are_synced_before_success(self):
        """CLI 4.2, step 5: the key file, then its name."""
        synced = []

        def fsync(fd):
            synced.append(os.readlink('/proc/self/fd/%d' % fd))

        os.mkdir(self.temp + '/keys')
        path = self.temp + '/keys/new.key'
        tarsnap.key_write(tarsnap.key_create(self.path), samples.full_key())
        with mock.patch.object(os, 'fsync', fsync):
            self.assertEqual(keygen.keymgmt_main(
                ['--outkeyfile', path, '-r', self.path]), 0)
        self.assertEqual([os.path.realpath(name) for name in synced],
                         [os.path.realpath(path),
                          os.path.realpath(self.temp + '/keys')])


class Wrappers(test_keygen.Online):
    """CLI 6.3 and 6.11."""

    def test_gui(self):
        """Password on standard input, no newline; then the number."""
        self.check_passes(self.make(), test_keygen.PASSWORD)
        out = self.check_passes(test_keygen.KEYMGMT
                                + ['--print-key-id', self.path])
        self.assertEqual(out, '%d\n' % self.load().machine)

    def test_docker_greps_writing(self):
        self.check_passes(self.make(), test_keygen.PASSWORD)
        cut = self.path + '2'
        self.check_passes(test_keygen.KEYMGMT
                          + ['--outkeyfile', cut, '-d', self.path])
        for path, status in ((self.path, 0), (cut, 1)):
            done = subprocess.run(
                '%s %s keymgmt --print-key-permissions %s | grep writing'
                % (*test_keygen.KEYGEN[:2], path), shell=True,
                stdout=subprocess.DEVNULL)
            self.assertEqual(done.returncode, status)

    def test_chef_expects_the_prompt(self):
        status, output = drive(
            self.make('--passphrased', '--passphrase-time', '0.05'),
            [('Enter tarsnap account password: ',
              test_keygen.PASSWORD + b'\r'),
             ('Please enter passphrase for keyfile %s: ' % self.path,
              b'word\r'), ('confirm', b'word\r')])
        self.assertEqual(status, 0, output)
        self.assertTrue(self.load(passphrase=b'word').can(2))


class Tarsnap(unittest.TestCase):
    """CLI 4.3: a key file with a passphrase, and --passphrase."""

    @classmethod
    def setUpClass(cls):
        w = cls.world = world.World(cls)
        done = w.tool('keygen', '--keyfile', w.path('key'), '--machine', 'm',
                      '--server', w.path('store'), '--passphrased',
                      '--passphrase-time', '0.05', '--passphrase-mem', '1M',
                      give=b'pass word\npass word')
        assert done.code == 0, done
        w.key = w.path('key')
        for name, data in (('one', b'pass word'), ('nl', b'pass word\n'),
                           ('crlf', b'pass word\r\n'),
                           ('wrong', b'pass\n'), ('empty', b''),
                           ('two', b'pass word\nmore\n'),
                           ('long', b'x' * 2049),
                           ('longest', b'x' * 2048 + b'\nmore')):
            world.write(w.path(name), data)

    def list(self, *words, give=b'', **environment):
        """--list-archives of the key, without a terminal."""
        w = self.world
        return w.tarsnap('--list-archives', *words, cache=None, give=give,
                         start_new_session=True,
                         env=dict(w.environment, **environment))

    def opens(self, *words, **options):
        done = self.list(*words, **options)
        self.assertEqual((done.code, done.out, done.err), (0, '', ''))

    def refuses(self, says, *words, **options):
        done = self.list(*words, **options)
        self.assertEqual(done.code, 1, done)
        self.assertIn(says, done.err)
        self.assertNotIn('Please enter', done.err)

    def file(self, name):
        return 'file:' + self.world.path(name)

    def test_opens(self):
        for name, words, options in (
                ('dev:tty-stdin without a terminal', (),
                 {'give': b'pass word\n'}),
                ('the same, no newline', (), {'give': b'pass word'}),
                ('dev:tty-stdin', ('--passphrase', 'dev:tty-stdin'),
                 {'give': b'pass word\nrest'}),
                ('dev:stdin-once', ('--passphrase', 'dev:stdin-once'),
                 {'give': b'pass word\n'}),
                ('--passphrase-stdin', ('--passphrase-stdin',),
                 {'give': b'pass word\n'}),
                ('env:VAR', ('--passphrase=env:WORD',),
                 {'WORD': 'pass word'}),
                ('file, no newline', ('--passphrase', self.file('one')), {}),
                ('file', ('--passphrase', self.file('nl')), {}),
                ('file, CR LF', ('--passphrase', self.file('crlf')), {})):
            with self.subTest(name):
                self.opens(*words, **options)

    def test_refuses(self):
        wrong = 'Passphrase is incorrect'
        for name, says, words, options in (
                ('wrong on stdin', wrong, (), {'give': b'pass\n'}),
                ('none on stdin', 'No passphrase on standard', (), {}),
                ('wrong, dev:stdin-once', wrong,
                 ('--passphrase', 'dev:stdin-once'), {'give': b'pass\n'}),
                ('wrong in env', wrong, ('--passphrase', 'env:WORD'),
                 {'WORD': 'pass'}),
                ('wrong in file', wrong,
                 ('--passphrase', self.file('wrong')), {}),
                ('empty file', wrong,
                 ('--passphrase', self.file('empty')), {}),
                ('env unset', 'WORD', ('--passphrase', 'env:WORD'), {}),
                ('no terminal', 'No terminal',
                 ('--passphrase', 'dev:tty-once'), {'give': b'pass word\n'}),
                ('file of two lines', 'one line',
                 ('--passphrase', self.file('two')), {}),
                ('file too long', 'one line',
                 ('--passphrase', self.file('long')), {}),
                ('file of two lines, the first the longest', 'one line',
                 ('--passphrase', self.file('longest')), {}),
                ('no file', 'passphrase file',
                 ('--passphrase', self.file('nowhere')), {}),
                ('unknown method', 'Invalid passphrase method',
                 ('--passphrase', 'dev:null'), {}),
                ('no method', 'Invalid passphrase method',
                 ('--passphrase', 'pass word'), {})):
            with self.subTest(name):
                self.refuses(says, *words, **options)

    def test_prompt_on_a_terminal(self):
        """V: tarsnapper's pattern; asked for once, and not shown."""
        w = self.world
        prompt = 'Please enter passphrase for keyfile %s: ' % w.key
        for method, typed, status in (
                ('dev:tty-stdin', b'pass word\n', 0),
                ('dev:tty-once', b'pass word\n', 0),
                ('dev:stdin-once', b'pass word\n', 0),
                ('dev:tty-stdin', b'pass\n', 1)):
            with self.subTest(method, status=status):
                found, output = drive(
                    w.argv(['--list-archives', '--passphrase', method],
                           cache=None), [(prompt, typed)],
                    HOME=w.path('home'))
                self.assertEqual(found, status, output)
                self.assertNotIn(b'pass word', output)
                self.assertEqual(output.count(b'Please enter'), 1)
                if status:
                    self.assertIn(b'Passphrase is incorrect', output)
                else:
                    self.assertEqual(output, prompt.encode() + b'\r\n')

    def test_terminal_comes_before_standard_input(self):
        w = self.world
        prompt = 'Please enter passphrase for keyfile %s: ' % w.key
        status, output = drive(w.argv(['--list-archives'], cache=None),
                               [(prompt, b'pass word\n')], b'not this\n')
        self.assertEqual(status, 0, output)

    def test_directive(self):
        world.write(self.world.path('conf'), (
            'passphrase %s\n' % self.file('nl')).encode())
        self.opens('--configfile', self.world.path('conf'))


if __name__ == '__main__':
    unittest.main()
