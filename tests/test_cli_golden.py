# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What -c -v prints for the patterns, list files and directories it is
given."""

import os
import subprocess
import sys
import unittest

import lab
import world

SAMPLE = ('a', 'dir1/b', 'dir1/c', 'dir2/d')
EVERYTHING = ['.', './a', './dir1', './dir1/b', './dir1/c', './dir2',
              './dir2/d']

GOLDEN = (
    # arguments before '.', members
    ((), EVERYTHING),
    (('--exclude', 'dir1'), ['.', './a', './dir2', './dir2/d']),
    (('--include', '.', '--include', 'dir1'),
     ['.', './dir1', './dir1/b', './dir1/c']),
    (('--include', '.', '--include', 'dir1', '--exclude', 'b'),
     ['.', './dir1', './dir1/c']),
    (('--exclude', './dir1/'), ['.', './a', './dir2', './dir2/d']),
    (('--exclude', '/dir1'), EVERYTHING),
    (('--exclude', '*/c'), [name for name in EVERYTHING
                            if name != './dir1/c']),
    (('--exclude', '[ab]'), ['.', './dir1', './dir1/c', './dir2',
                             './dir2/d']),
    (('--exclude', 'd?r1'), ['.', './a', './dir2', './dir2/d']),
    (('--exclude', 'r1'), EVERYTHING),
    (('--include', 'dir1'), []),
    (('-n',), ['.']),
)


class GoldenTest(lab.LabTest):

    def setUp(self):
        super().setUp()
        for name in SAMPLE:
            self.write(name)

    def verbose(self, *args, dry='--dry-run-metadata', status=0):
        """The members `-c -v` names, in their order."""
        result = lab.run(['--no-default-config', '-c', dry, '-v', '-C',
                          self.lab.tree, *args])
        self.assertEqual(result.status, status, result)
        self.assertEqual(result.out, '')
        lines = [line for line in result.err.splitlines()
                 if not line.startswith('tarsnap: ')]
        self.assertTrue(all(line.startswith('a ') for line in lines), lines)
        return [line[2:] for line in lines]

    def list(self, data):
        path = self.lab.fresh('list')
        with open(path, 'wb') as file:
            file.write(data)
        return path

    def test_patterns(self):
        for args, members in GOLDEN:
            with self.subTest(' '.join(args)):
                for dry in ('--dry-run', '--dry-run-metadata'):
                    self.assertEqual(self.verbose(*args, '.', dry=dry),
                                     members)

    def test_n_with_a_list_stores_exactly_what_is_listed(self):
        names = ['.', './dir1', './dir2/d']
        path = self.list('\n'.join(names).encode())
        self.assertEqual(self.verbose('-n', '-T', path), names)

    def test_list_file_rules(self):
        for rule, data, args, members in (
                ('newline', b'a\ndir1/b\n', (), ['a', 'dir1/b']),
                ('return', b'a\rdir1/b', (), ['a', 'dir1/b']),
                ('both', b'a\r\ndir1/b\r\n', (), ['a', 'dir1/b']),
                ('empty lines', b'\n\na\n\n', (), ['a']),
                ('NUL', b'a\0dir1/b\0', ('--null',), ['a', 'dir1/b']),
                ('NUL, not -C', b'-C\0a', ('--null-input',), ['-C', 'a']),
                ('-C line', b'-C\ndir1\nb\n-C\n../dir2\nd', (), ['b', 'd']),
                ('before operands', b'dir2\n', ('a',),
                 ['dir2', 'dir2/d', 'a']),
                ('-C chains on into operands', b'-C\ndir1\n', ('b',), ['b']),
                ('nothing', b'', (), [])):
            with self.subTest(rule):
                self.write('-C') if 'not -C' in rule else None
                flags = [arg for arg in args if arg.startswith('-')]
                rest = [arg for arg in args if not arg.startswith('-')]
                self.assertEqual(self.verbose(
                    *flags, '-T', self.list(data), *rest), members)

    def test_I_is_T_and_the_last_one_wins(self):
        one, two = self.list(b'a'), self.list(b'dir2/d')
        self.assertEqual(self.verbose('-T', one, '-I', two), ['dir2/d'])
        self.assertEqual(self.verbose('--files-from', two, '-T', one), ['a'])

    def test_exclude_from_reads_at_once(self):
        lines, nuls = self.list(b'dir1\r\n\na'), self.list(b'dir1\0a')
        wanted = ['.', './dir2', './dir2/d']
        self.assertEqual(self.verbose('-X', lines, '.'), wanted)
        self.assertEqual(self.verbose('--exclude-from', lines, '.'), wanted)
        self.assertEqual(self.verbose('--null', '-X', nuls, '.'), wanted)
        # --null comes too late: that is said, rather than nothing excluded.
        self.assertEqual(self.verbose('-X', nuls, '--null', '.', status=1),
                         [])

    def test_C_is_lazy_and_chains(self):
        for rule, args, members in (
                ('relative ones compose', ('-C', 'dir1', '-C', '../dir2',
                                           'd'), ['d']),
                ('among operands', ('a', '-C', 'dir1', 'b', '-C..', 'dir2'),
                 ['a', 'b', 'dir2', 'dir2/d']),
                ('unused, it is not entered', ('a', '-C', 'nowhere'),
                 ['a'])):
            with self.subTest(rule):
                self.assertEqual(self.verbose(*args), members)

    def test_an_absolute_name_does_not_enter_C(self):
        path = os.path.join(self.lab.tree, 'a')
        self.assertEqual(self.verbose('-C', 'nowhere', path),
                         [path.lstrip('/')])
        self.assertEqual(self.verbose('-T', self.list(
            b'-C\nnowhere\n' + os.fsencode(path))), [path.lstrip('/')])
        self.assertEqual(self.verbose('-C', 'nowhere', 'a', status=1), [])

    def test_patterns_see_absolute_paths_as_they_were_given(self):
        top = self.lab.tree
        stored = top.lstrip('/')
        for exclude in (top + '/dir1', top + '/d*1', 'dir1',
                        stored + '/dir1'):
            with self.subTest(exclude=exclude):
                self.assertEqual(
                    self.verbose('--exclude', exclude, top),
                    [stored + name for name in
                     ('', '/a', '/dir2', '/dir2/d')])
        for include in (top, stored):
            with self.subTest(include=include):
                self.assertEqual(
                    self.verbose('--include', include, top + '/dir2'),
                    [stored + '/dir2', stored + '/dir2/d'])

    def test_errors(self):
        for rule, args, said in (
                ('no list', ('-T', 'nowhere'), 'Cannot read list nowhere: '),
                ('no exclude list', ('-X', 'nowhere', '.'),
                 '-X: Cannot read list nowhere: '),
                ('-C at the end', ('-T', self.list(b'a\n-C\n')),
                 'A list of names ends after -C'),
                ('nothing at all', (), 'No files or directories specified')):
            with self.subTest(rule):
                result = lab.run(['--no-default-config', '-c', '--dry-run',
                                  '-C', self.lab.tree, *args])
                self.assertEqual(result.status, 1)
                self.assertIn('tarsnap: ' + said, result.err)


class VerboseTest(lab.LabTest):
    """`a` lines of -v and -vv."""

    def setUp(self):
        super().setUp()
        self.host.create('nothing')
        self.write('d/file', b'x' * 4000)
        path = self.write('d/first', b'four')
        os.link(path, self.lab.path('tree', 'd', 'second'))
        os.symlink('file', self.lab.path('tree', 'd', 'soft'))
        os.mkfifo(self.lab.path('tree', 'd', 'pipe'))
        self.write('d/new\nline\x1b')
        for top, dirs, files in os.walk(self.lab.tree):
            for name in dirs + files:
                os.utime(os.path.join(top, name), (10 ** 9, 10 ** 9),
                         follow_symlinks=False)
        os.utime(self.lab.tree, (10 ** 9, 10 ** 9))

    def lines(self, name, *args):
        return self.host.good('-c', '-f', name, *args, '-C', self.lab.tree,
                              '.').err.splitlines()

    def test_v_shows_paths_that_keep_their_line(self):
        self.assertEqual(
            self.lines('a', '-v'),
            ['a .', 'a ./d', 'a ./d/file', 'a ./d/first',
             'a ./d/new\\nline\\033', 'a ./d/pipe', 'a ./d/second',
             'a ./d/soft'])

    def test_vv_shows_what_tv_shows(self):
        for name, args in (('read', ()), ('unchanged', ()),
                           ('iso', ('--iso-dates', '--numeric-owner'))):
            with self.subTest(name):
                shown = self.lines(name, '-vv', *args)
                listed = self.host.good(
                    '-tv', '-f', name, *args,
                    cache=False).out.splitlines()
                self.assertEqual(shown, ['a ' + line for line in listed])
                self.assertIn('d/soft -> file', '\n'.join(shown))
                self.assertIn('d/second link to ./d/first',
                              '\n'.join(shown))

    def test_vv_of_dry_runs(self):
        shown = self.lines('a', '-vv')
        for option in ('--dry-run', '--dry-run-metadata'):
            with self.subTest(option):
                self.assertEqual(self.lines('b', '-vv', option), shown)

    def test_vv_of_a_merged_archive(self):
        shown = self.lines('a', '-vv')
        result = self.host.good('-c', '-vv', '-f', 'b', '@@a')
        # Who has the first name is not known of an archive's entries.
        self.assertEqual(
            [line for line in result.err.splitlines()
             if '/second' not in line],
            [line for line in shown if '/second' not in line])

    def test_vv_of_a_command(self):
        result = self.host.good('-c', '-vv', '-f', 'a', '--command',
                                'x=echo 123')
        self.assertRegex(result.err, r'^a -rw-------  0 \S+ +\S+ +4 .* x\n$')


class ProgramTest(lab.LabTest):
    """The program as cron and scripts start it."""

    def program(self, *args, env=(), stdin=b'', before=()):
        return subprocess.run(
            [*before, sys.executable, world.Programs.path('tarsnap'),
             '--no-default-config', '-c', '--dry-run', '-v', '-C',
             self.lab.tree, *args], input=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=dict(os.environ, **dict(env)))

    def setUp(self):
        super().setUp()
        for name in ('a', 'b'):
            self.write(name)

    def test_T_from_standard_input_without_a_last_newline(self):
        done = self.program('-T', '-', stdin=b'b\na')
        self.assertEqual((done.returncode, done.stderr), (0, b'a b\na a\n'))

    def test_T_from_a_standard_input_that_is_closed(self):
        done = self.program('-T', '-', before=('sh', '-c', 'exec "$@" <&-',
                                               'sh'))
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.splitlines()[0],
                         b'tarsnap: Cannot read the list of names: standard '
                         b'input is closed')

    def test_names_of_any_bytes_in_the_C_locale(self):
        name = 'n\u00e9'.encode() + b'\xff'
        with open(os.path.join(os.fsencode(self.lab.tree), name), 'wb'):
            pass
        shown = 'n\u00e9\\377'.encode()
        for args, said in (
                (('-T', '-'), b'a ' + shown + b'\n'),
                ((name,), b'a ' + shown + b'\n'),
                (('-T', '-', '-s', b'/\xff/\xc3\xa8/p'),
                 shown + b' >> ' + 'n\u00e9\u00e8'.encode() + b'\na '
                 + 'n\u00e9\u00e8'.encode() + b'\n'),
                (('--exclude', name, '.'), b'a .\na ./a\na ./b\n'),
                (('--command', name + b'=true'), b'a ' + shown + b'\n')):
            with self.subTest(args):
                done = self.program(*args, stdin=name,
                                    env={'LC_ALL': 'C'})
                self.assertEqual((done.returncode, done.stderr), (0, said))


class WrapperTest(lab.LabTest):
    """The command lines of -c that tools build."""

    def test_each(self):
        self.write('data/keep')
        self.write('data/skip')
        os.symlink('data', self.lab.path('tree', 'link'))
        tree, root = self.lab.tree, self.lab.tree.lstrip('/')
        both = ['data/', 'data/keep', 'data/skip']
        for tool, args, members in (
                ('acts', ('-c', '-f', 'h-daily-2026-11-23_04:05:06', '-C',
                          tree, '--one-file-system', '--humanize-numbers',
                          'data'), both),
                ('acts monthly', (
                    '-c', '-f', 'h-monthly-2026-11', '--one-file-system',
                    '--exclude', 'skip', '@@h-daily-2026-11-23_04:05:06'),
                 both[:2]),
                ('tarsnapper', ('-c', '--exclude', 'skip', '-f', 'job',
                                tree + '/data'),
                 [root + '/' + name for name in both[:2]]),
                ('gui', ('--maxbw-rate-up', '10000000', '--dry-run',
                         '--nodump', '--one-file-system', '-L',
                         '--creationtime', '1700000000', '--quiet',
                         '--print-stats', '--no-humanize-numbers', '-c',
                         '-f', 'gui dry', '--exclude', 'skip',
                         tree + '/data'), None),
                ('gui', ('--nodump', '-P', '-L', '--creationtime',
                         '1700000000', '--quiet', '--print-stats',
                         '--no-humanize-numbers', '-c', '-f', 'gui',
                         '--exclude', 'skip', tree + '/link'),
                 [tree + '/link/', tree + '/link/keep']),
                ('snapback', ('--quiet', '--no-print-stats', '-c', '-f',
                              'snap', '-C', tree, '-H', '--store-atime',
                              '-P', '--creationtime', '1700000000', '-s',
                              '/^data/new/', '--exclude', 'skip', '--',
                              'data'), ['new/', 'new/keep']),
                ('generations', ('-c', '-f', 'gen', '--one-file-system',
                                 '-C', '/', root + '/data'),
                 [root + '/' + name for name in both]),
                ('c4rlo', ('-L', '--exclude', 'skip', '-cf', 'c4rlo',
                           tree + '/data'),
                 [root + '/' + name for name in both[:2]]),
                ('stathat', ('-fattached', '-c', '-C' + tree, 'data'), both),
                ('nixos', ('-c', '-f', 'nix', '-v', '-H', tree + '/link'),
                 [root + '/link/', root + '/link/keep',
                  root + '/link/skip'])):
            with self.subTest(tool):
                result = self.host.run(*args)
                self.assertEqual(result.status, 0, result)
                if members is None:
                    self.assertRegex(result.err,
                                     r'(?m)^This archive\s+(\d+)\s+(\d+)$')
                    continue
                name = next((arg[2:] for arg in args if arg.startswith('-f')
                             and len(arg) > 2), None) or args[max(
                                 args.index(word) for word in
                                 ('-f', '-cf') if word in args) + 1]
                flags = ['-P'] if members[0].startswith('/') else []
                self.assertEqual(self.host.good(
                    '-t', *flags, '-f', name,
                    cache=False).out.splitlines(), members)


if __name__ == '__main__':
    unittest.main()
