# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What is checked before a mode begins, and in which order; the cache
directory and its lock; passphrases; how a run ends and what it says.

All of it through the program, on one store with one archive.
"""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import unittest

import world

DELAYED = 'tarsnap: Error exit delayed from previous errors.'
CHANGED = 'tarsnap: The server has changed what it stores nevertheless.'
PROMPT = r'Please enter passphrase for keyfile .*?:'    # tarsnapper's


def on_terminal(argv, environment, *answers):
    """(exit status, all that was said) of a program on a terminal of its own;
    each answer is typed when a prompt for a passphrase stands there.
    """
    pid, terminal = pty.fork()
    if not pid:
        try:
            os.execve(argv[0], argv, environment)
        finally:
            os._exit(127)
    said, seen, answers = b'', 0, list(answers)
    try:
        while select.select([terminal], [], [], 60)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:             # Linux: the other end is closed
                break
            if not data:
                break
            said += data
            if answers and re.search(PROMPT.encode() + b' $', said[seen:]):
                seen = len(said)
                os.write(terminal, answers.pop(0) + b'\n')
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(terminal)
    return status, said.decode()


class StartupCase(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'dir')
        world.write(w.path('tree', 'file'), b'content')
        w.keygen()
        w.ok('-c', '-f', 'kept', '-C', w.root, 'tree')

    def run_bare(self, *words, **options):
        """The program with nothing but these words."""
        w = self.world
        return w.run([sys.executable, w.program('tarsnap'), *words],
                     start_new_session=True, **options)

    def fails(self, done, *lines, code=1):
        """It failed with these lines (expressions) on stderr, no other."""
        self.assertEqual((done.code, done.out), (code, ''), done)
        self.assertEqual(len(done.lines), len(lines), done)
        for line, expression in zip(done.lines, lines):
            self.assertRegex(line, '^tarsnap: .*' + expression)


class Checks(StartupCase):
    """Contract 1.2."""

    def test_order(self):
        """Everything is wrong; each step mends the first thing named."""
        w = self.world
        conf = w.path('order.conf')
        lists = '/dev/null'
        steps = [
            ('parse', ['-d', '--bogus'], 'Unknown option'),
            ('mode of a delayed option', [
                '-d', '--checkpoint-bytes', '1G', '--configfile', conf,
                'left'], 'not permitted in mode -d'),
            ('--configfile', ['-d', '--configfile', w.path('none'),
                              '--configfile', conf, 'left'], 'none: No such'),
            ('its content', ['-d', '--configfile', conf, 'left'],
             'unknown directive'),
            ('a list of names', ['-d', '--archive-names', w.path('none'),
                                 'left'], 'Cannot read archive names'),
            ('names', ['-d', '--archive-names', lists, 'left'],
             'Archive name must be specified'),
            ('length of the name', ['-c', '-f', '', 'x'], '1 to 1023 bytes'),
            ('cache directory', ['-d', '-f', 'a', 'left'],
             'Cache directory must be specified for -d'),
            ('its state', ['-d', '-f', 'a', '--cachedir', w.path('fresh'),
                           'left'], 'fresh.*--fsck'),
            ('operands', ['-d', '-f', 'a', '--cachedir', w.path('cache'),
                          'left'], 'no operands: left'),
            ('key file', ['-d', '-f', 'a', '--cachedir', w.path('cache')],
             'Key file must be specified'),
            ('key file to be read', ['--list-archives', '--cachedir',
                                     w.path('fresh'), '--keyfile',
                                     w.path('none')], 'none: No such'),
        ]
        world.write(conf, b'bogus\n')
        for step, words, says in steps:
            with self.subTest(step):
                done = self.run_bare('--no-default-config', *words)
                self.assertEqual((done.code, done.out), (1, ''), done)
                self.assertRegex(done.lines[0], '^tarsnap: .*' + says)
                self.assertNotIn(DELAYED, done.lines)
        self.assertFalse(os.path.exists(w.path('fresh')))

    def test_what_is_not_imported(self):
        """What takes long, and is of no use to a short command."""
        w = self.world
        done = w.run(w.argv(['--list-archives']), env=dict(
            w.environment, PYTHONPROFILEIMPORTTIME='1'))
        self.assertEqual(done.code, 0)
        names = {line.rpartition('|')[2].strip() for line in done.lines}
        self.assertIn('cryptography.hazmat.primitives.asymmetric.ed25519',
                      names)
        for name in ('cryptography.hazmat.primitives.serialization',
                     'cryptography.x509', 'tarfile', 'email', 'http.client',
                     'urllib.request', 'asyncio', 'subprocess', 'shutil'):
            self.assertNotIn(name, names)

    def test_verify_config_before_the_key(self):
        done = self.run_bare('--no-default-config', '--verify-config',
                             '--keyfile', '/none', '--cachedir', '/none')
        self.assertEqual((done.code, done.out + done.err), (0, ''))

    def test_names_needed(self):
        for mode in ('-c', '-d', '-t', '-x', '-r'):
            self.fails(self.world.tarsnap(mode),
                       'Archive name must be specified')
        self.fails(self.world.tarsnap('-d', '--archive-names', '-', give=b''),
                   'Archive name must be specified')

    def test_one_name(self):
        for mode in ('-c', '-t', '-x', '-r'):
            self.fails(self.world.tarsnap(mode, '-f', 'a', '-f', 'b'),
                       'Mode %s takes one archive name' % mode)

    def test_names_refused(self):
        for mode in ('--fsck', '--fsck-prune', '--nuke', '--recover',
                     '--initialize-cachedir', '--verify-config',
                     '--list-archives'):
            done = self.world.tarsnap(mode, '-f', 'a', give=b'No Tomorrow\n')
            self.fails(done, mode)
        self.assertEqual(self.world.names(), ['kept'])

    def test_operands_left_over(self):
        for mode in ('-d', '-r', '--list-archives', '--print-stats', '--fsck',
                     '--fsck-prune', '--recover', '--initialize-cachedir',
                     '--nuke'):
            name = ['-f', 'kept'] if mode in ('-d', '-r') else []
            done = self.world.tarsnap(mode, *name, 'a2',
                                      give=b'No Tomorrow\n')
            self.fails(done, 'Mode %s takes no operands: a2' % mode)
        self.assertEqual(self.world.names(), ['kept'])

    def test_cachedir_needed(self):
        for words in (['-c', '-f', 'x', 'y'], ['-d', '-f', 'kept'],
                      ['--print-stats'], ['--fsck'], ['--fsck-prune'],
                      ['--recover'], ['--initialize-cachedir']):
            self.fails(self.world.tarsnap(*words, cache=None),
                       'Cache directory must be specified for %s' % words[0])

    def test_state_needed(self):
        w = self.world
        empty = w.path('empty')
        for words in (['-d', '-f', 'kept'], ['--print-stats'],
                      ['--recover']):
            done = w.tarsnap(*words, cache=empty)
            self.fails(done, 'Error reading cache directory .*--fsck')
        self.assertEqual(w.names(), ['kept'])

    def test_archive_names(self):
        w = self.world
        for data in (b'kept', b'kept\n', b'\n\nkept\r\n\r', b'\rkept\r'):
            world.write(w.path('names'), data)
            for source, give in ((w.path('names'), None), ('-', data)):
                with self.subTest(data, source=source):
                    done = w.ok('-t', '--archive-names', source, give=give)
                    self.assertEqual(done.out, 'tree/\ntree/file\n')
        # NUL is no separator here, whatever --null says.
        self.fails(w.tarsnap('-t', '--null', '--archive-names', '-',
                             give=b'kept\0'),
                   r'Archive does not exist: kept\\000$',
                   'Error reading archive', 'Error exit')
        # Names add up with those of -f.
        done = w.ok('--print-stats', '-f', 'kept', '--archive-names', '-',
                    give=b'kept\n')
        self.assertEqual(done.out.count('\nkept '), 2)
        self.fails(w.tarsnap('-t', '-f', 'kept', '--archive-names', '-',
                             give=b'other\n'), 'one archive name')
        done = w.run(['sh', '-c', '"$@" <&-', 'sh'] + w.argv(
            ['-t', '--archive-names', '-']))
        self.fails(done, 'Cannot read archive names from standard input')

    def test_a_nul_in_a_name(self):
        # As of `find -print0` without --null; told before anything is done.
        w = self.world
        nul = 'NULs in it.*--null'
        for words in (['-c', '-f', 'n', '-T', '-'],
                      ['-t', '-f', 'kept', '-T', '-'],
                      ['-c', '-f', 'n', '-X', '-', 'tree'],
                      ['-x', '-f', 'kept', '-X', '-']):
            with self.subTest(words):
                self.fails(w.tarsnap(*words, give=b'tree/file\0tree\0',
                                     cwd=w.root), nul)
        self.fails(w.tarsnap('-c', '--archive-names', '-', 'tree',
                             give=b'a\0b\n', cwd=w.root),
                   'name must not have a NUL')
        world.write(w.path('nul.conf'), b'keyfile /a\0b\n')
        self.fails(w.tarsnap('--configfile', w.path('nul.conf'),
                             '--list-archives', key=None),
                   ':1: keyfile: a NUL in the argument')
        self.assertEqual(w.names(), ['kept'])

    def test_roles(self):
        w = self.world
        cases = [('-r', 'write', ['-c', '-f', 'x', '-C', w.root, 'tree']),
                 ('-w', 'read', ['-t', '-f', 'kept']),
                 ('-w', 'read', ['--list-archives']),
                 ('-w', 'read', ['-r', '-f', 'kept']),
                 ('-w', 'delete', ['-d', '-f', 'kept']),
                 ('-r', 'nuke|delete', ['--nuke'])]
        for role, need, words in cases:
            with self.subTest(role, mode=words[0]):
                key = w.path('key' + role)
                if not os.path.exists(key):
                    w.subset('key' + role, role)
                done = w.tarsnap(*words, key=key, give=b'No Tomorrow\n')
                self.assertEqual(done.code, 1)
                self.assertRegex(done.lines[0],
                                 '(%s) authorization' % need)
                self.assertIn(words[0], done.lines[0])

    def test_dry_run_without_a_key(self):
        w = self.world
        words = ['-c', '--dry-run', '-C', w.root, 'tree']
        done = w.tarsnap(*words, key=None, cache=None)
        self.assertEqual((done.code, done.out + done.err), (0, ''))
        self.fails(w.tarsnap(*words, key=None), '--cachedir needs a key')
        self.fails(w.tarsnap(*words, key=w.path('none'), cache=None),
                   'none: No such file')
        world.write(w.path('dry.conf'), b'keyfile /none/such\n'
                    b'cachedir %s\nprint-stats\n'
                    % w.path('not made').encode())
        done = w.tarsnap('--configfile', w.path('dry.conf'), *words, key=None,
                         cache=None)
        self.assertEqual(done.code, 0, done)
        self.assertRegex(done.lines[0], '^tarsnap: Ignoring cachedir')
        self.assertRegex(done.lines[1], '^tarsnap: Sizes are approximate')
        self.assertRegex(done.lines[2], '^ +Total size')
        self.assertFalse(os.path.exists(w.path('not made')))


class CacheDirectory(StartupCase):
    """Contract 5.2 and 5.3."""

    def test_made_in_any_mode(self):
        # Each level, 0700, said on stderr; also where it is not needed.
        w = self.world
        where = w.path('deep', 'er', 'cache')
        done = self.run_bare('--no-default-config', '--keyfile', w.key,
                             '--cachedir', where, '--list-archives')
        self.assertEqual((done.code, done.out), (0, 'kept\n'), done)
        self.assertEqual(done.lines, [
            'Directory %s created for "--cachedir %s"' % (path, where)
            for path in (w.path('deep'), w.path('deep', 'er'), where)])
        for path in (w.path('deep'), where):
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o700)

    def test_relative(self):
        w = self.world
        done = self.run_bare(
            '--no-default-config', '--keyfile', w.key, '--cachedir', 'rel',
            '--fsck', cwd=w.root)
        self.assertEqual(done.code, 0, done)
        done = self.run_bare(
            '--no-default-config', '--keyfile', w.key, '--cachedir', 'rel',
            '-c', '-f', 'relative', '-C', 'tree', '.', cwd=w.root)
        self.assertEqual((done.code, done.err), (0, ''))
        w.ok('-d', '-f', 'relative')
        self.assertEqual(os.listdir(w.path('tree')), ['file'])

    def test_below_a_directory_that_is_gone(self):
        w = self.world
        gone = w.path('gone')
        os.mkdir(gone)
        done = w.run(['sh', '-c', 'rmdir "$0"; exec "$@"', gone] + w.argv(
            ['--list-archives'], cache='rel'), cwd=gone)
        self.fails(done, 'Cannot find cache directory rel below')

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which('setpriv'),
                         'only root with setpriv can drop its rights')
    def test_of_somebody_else(self):
        # Who may read it gets statistics; who may not hears why.
        w = self.world
        where = w.path('of another')
        shutil.copytree(w.path('cache'), where, symlinks=True)
        for path, mode in (('', 0o555), ('directory', 0o444),
                           ('lockf', 0o444), ('cache', 0o444)):
            os.chown(os.path.join(where, path), 12345, 12345)
            os.chmod(os.path.join(where, path), mode)
        drop = ['setpriv', '--bounding-set', '-dac_override,-dac_read_search,'
                '-fowner']
        for words in (['--print-stats'], ['--print-stats', '-f', '*'],
                      ['--list-archives']):
            done = w.run(drop + w.argv(words, cache=where))
            self.assertEqual((done.code, done.err), (0, ''), done)
        done = w.run(drop + w.argv(['-c', '-f', 'x', w.path('tree')],
                                   cache=where))
        self.assertEqual(done.lines[0], 'tarsnap: Error reading cache '
                         'directory %s: Permission denied' % where)
        os.chmod(where, 0)
        for words in (['--print-stats'], ['--list-archives'],
                      ['-d', '-f', 'kept']):
            done = w.run(drop + w.argv(words, cache=where))
            self.assertEqual((done.code, done.lines[0]), (
                1, 'tarsnap: Error reading cache directory %s: Permission '
                'denied' % where), done)
        os.chmod(where, 0o700)

    def test_looser_bits_are_removed(self):
        os.chmod(self.world.path('cache'), 0o755)
        self.world.ok('--list-archives')
        self.assertEqual(stat.S_IMODE(os.stat(
            self.world.path('cache')).st_mode), 0o700)

    def test_files(self):
        w = self.world
        world.write(w.path('cache', 'firstrun'), b'of NixOS')
        self.assertTrue(stat.S_ISREG(os.lstat(
            w.path('cache', 'directory')).st_mode))
        lock = os.stat(w.path('cache', 'lockf')).st_ino
        tags = set()
        for words in (['-c', '-f', 'b', '-C', w.root, 'tree'],
                      ['-d', '-f', 'b'], ['--fsck']):
            w.ok(*words)
            link = w.path('cache', 'cseq')
            self.assertTrue(os.path.islink(link))
            self.assertFalse(os.path.exists(link))
            self.assertRegex(os.readlink(link), r'\A[0-9a-f]+\Z')
            tags.add(os.readlink(link))
            self.assertTrue(os.path.isfile(w.path('cache', 'directory')))
        self.assertEqual(len(tags), 2)          # --fsck commits nothing
        self.assertEqual(os.stat(w.path('cache', 'lockf')).st_ino, lock)
        with open(w.path('cache', 'firstrun')) as file:
            self.assertEqual(file.read(), 'of NixOS')

    @contextlib.contextmanager
    def locked(self, lock=fcntl.lockf):
        with open(self.world.path('cache', 'lockf'), 'r+b') as file:
            lock(file, fcntl.LOCK_EX)
            yield file

    def test_locked(self):
        w = self.world
        create = ['-c', '-f', 'x', '-C', w.root, 'tree']
        with self.locked():
            for words, mode in (
                    (create, 'creating archive'),
                    (['--dry-run'] + create, 'creating archive'),
                    (['-d', '-f', 'kept'], 'deleting archive'),
                    (['--fsck'], 'fscking archives')):
                with self.subTest(words):
                    self.fails(w.tarsnap(*words),
                               'Transaction already in progress',
                               'Error %s$' % mode, 'Error exit delayed')
            for words in (['--list-archives'], ['-t', '-f', 'kept'],
                          ['-r', '-f', 'kept'], ['-x', '-O', '-f', 'kept'],
                          ['--print-stats', '-f', 'kept']):
                with self.subTest(words):
                    w.ok(*words)

    def test_flock_is_another_lock(self):
        with self.locked(fcntl.flock):
            self.world.ok('--fsck')
            self.world.ok('-c', '--dry-run', '-C', self.world.root, 'tree')

    def test_lock_wait(self):
        w = self.world
        dry = ['-c', '--dry-run', '-C', w.root, 'tree']
        with self.locked() as file:
            self.fails(w.tarsnap('--lock-wait', '0.3', *dry),
                       'Transaction already', 'Error creating', 'Error exit')
            running = w.start('--lock-wait', '60', *dry)
            timer = threading.Timer(1, lambda: fcntl.lockf(
                file, fcntl.LOCK_UN))
            timer.start()
            self.assertEqual(running.wait().code, 0)
            timer.join()
        for value in ('-1', 'soon', ''):
            self.fails(w.tarsnap('--lock-wait=' + value, *dry),
                       '--lock-wait: ')


class Passphrase(StartupCase):
    """Contract 4.3."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        w = cls.world
        done = w.tool(
            'keymgmt', '--outkeyfile', w.path('locked'), '-r',
            '--passphrased', '--passphrase-mem', '10M', '--passphrase-time',
            '0.05', '--new-passphrase', 'env:P', w.key,
            env=dict(w.environment, P='open sesame'))
        if done.code:
            raise AssertionError(done)

    def command(self, *words):
        return self.world.argv(['--list-archives', *words],
                               key=self.world.path('locked'))

    def detached(self, *words, **options):
        """Without a terminal."""
        return self.world.run(self.command(*words), start_new_session=True,
                              **options)

    def test_terminal(self):
        w = self.world
        for words in ([], ['--passphrase', 'dev:tty-stdin'],
                      ['--passphrase', 'dev:tty-once'],
                      ['--passphrase', 'dev:stdin-once'],
                      ['--passphrase-stdin']):
            with self.subTest(words):
                code, said = on_terminal(self.command(*words), w.environment,
                                         b'open sesame')
                self.assertEqual(code, 0, said)
                # The prompt, no echo, and then nothing but the name.
                self.assertEqual(said.replace('\r', ''), (
                    'Please enter passphrase for keyfile %s: \nkept\n'
                    % w.path('locked')))

    def test_wrong_on_the_terminal(self):
        code, said = on_terminal(self.command(
            '--passphrase', 'dev:tty-once'), self.world.environment, b'guess')
        self.assertEqual(code, 1)
        self.assertIn('Passphrase is incorrect', said)
        self.assertNotIn('Error exit', said)

    def test_standard_input(self):
        for words in ([], ['--passphrase', 'dev:stdin-once'],
                      ['--passphrase-stdin']):
            for data in (b'open sesame\n', b'open sesame'):
                with self.subTest(words, data=data):
                    done = self.detached(*words, give=data)
                    self.assertEqual((done.code, done.out, done.err),
                                     (0, 'kept\n', ''))
            self.fails(self.detached(*words, give=b'guess\n'),
                       'Passphrase is incorrect')

    def test_standard_input_is_read_by_something_else(self):
        archive = ['-t', '-f', 'kept', '-T', '-']
        for words, by in ((archive, '-T -'),
                          (['-t', '--archive-names', '-'],
                           '--archive-names -'),
                          (['-c', '-f', 'new', '@-'], '@-')):
            argv = self.world.argv(words, key=self.world.path('locked'))
            for method in [], ['--passphrase-stdin']:
                if by == '@-' and method:
                    continue            # then the tar file is the rest
                with self.subTest(words, method=method):
                    done = self.world.run(argv + method,
                                          start_new_session=True,
                                          give=b'kept\n')
                    self.fails(done, 'Standard input is read by %s; take the '
                               'passphrase from elsewhere' % by)
        # Of a tar file the passphrase may be the line before.
        w, key = self.world, self.world.path('locked-all')
        done = w.tool(
            'keymgmt', '--outkeyfile', key, '-r', '-w', '--passphrased',
            '--passphrase-mem', '10M', '--passphrase-time', '0.05',
            '--new-passphrase', 'env:P', w.key,
            env=dict(w.environment, P='open sesame'))
        self.assertEqual(done.code, 0, done)
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode='w') as file:
            file.addfile(tarfile.TarInfo('member'))
        done = w.run(w.argv(['--passphrase-stdin', '-c', '-f', 'new', '@-'],
                            key=key), start_new_session=True,
                     give=b'open sesame\n' + tar.getvalue())
        self.assertEqual((done.code, done.err), (0, ''))
        self.assertEqual(w.ok('-t', '-f', 'new').out, 'member\n')
        w.ok('-d', '-f', 'new')
        # A key without one does not ask.
        done = self.world.tarsnap(*archive, '--passphrase-stdin', cache=None,
                                  give=b'none/such\n')
        self.assertIn('none/such: Not found', done.err)

    def test_nothing_to_ask(self):
        self.fails(self.detached('--passphrase', 'dev:tty-once',
                                 give=b'open sesame\n'), 'No terminal')
        for words, also in (([], ', and no terminal to ask on'),
                            (['--passphrase-stdin'], '')):
            for data in b'', b'\n':
                self.fails(self.detached(*words, give=data),
                           'No passphrase on standard input%s; --passphrase '
                           'file:PATH or env:NAME' % also)
        done = self.world.run(['sh', '-c', '"$@" <&-', 'sh'] + self.command(),
                              start_new_session=True)
        self.fails(done, 'No terminal and no standard input')

    def test_environment_and_file(self):
        w = self.world
        env = dict(w.environment, SECRET='open sesame')
        done = self.detached('--passphrase', 'env:SECRET', env=env)
        self.assertEqual((done.code, done.out), (0, 'kept\n'))
        self.fails(self.detached('--passphrase', 'env:OTHER', env=env),
                   'OTHER.*not set')
        secret = w.path('secret')
        for data, says in ((b'open sesame\n', None), (b'open sesame', None),
                           (b'open sesame\r\n', None),
                           (b'open sesame\ntwo\n', 'one line'),
                           (b'x' * 2049, 'one line of at most 2048'),
                           (b'guess\n', 'Passphrase is incorrect')):
            world.write(secret, data)
            done = self.detached('--passphrase', 'file:' + secret)
            if says:
                self.fails(done, says)
            else:
                self.assertEqual((done.code, done.out), (0, 'kept\n'), done)
        self.fails(self.detached('--passphrase', 'file:/none'),
                   '/none: No such file')

    def test_unknown_method(self):
        for method in ('dev:null', 'env:', 'file:', 'secret', ''):
            self.fails(self.detached('--passphrase=' + method),
                       '--passphrase: Invalid passphrase method')

    def test_of_the_configuration(self):
        path = self.world.path('pass.conf')
        world.write(path, b'passphrase env:SECRET\n')
        env = dict(self.world.environment, SECRET='open sesame')
        done = self.detached('--configfile', path, env=env)
        self.assertEqual(done.code, 0, done)
        # The command line is first.
        done = self.detached('--configfile', path, '--passphrase-stdin',
                             give=b'open sesame\n')
        self.assertEqual((done.code, done.out), (0, 'kept\n'))


class Endings(StartupCase):
    """Contract 3.11 and 3.12."""

    def test_prefix_is_the_name_it_was_started_as(self):
        w = self.world
        for name, prefix in (('tarsnap', 'tarsnap'), ('backup', 'backup'),
                             ('tarsnap-1.0', 'tarsnap-1.0'),
                             ('tarsnap.py', 'tarsnap')):
            link = w.path(name)
            os.symlink(os.path.join(world.ROOT, 'tarsnap.py'), link)
            done = w.run([sys.executable, link, '--no-default-config'])
            self.assertTrue(done.err.startswith(prefix + ': Must specify'),
                            done)
            os.unlink(link)

    def test_order(self):
        w = self.world
        self.fails(w.tarsnap('-t', '-f', 'none'),
                   'Archive does not exist: none$', 'Error reading archive$',
                   'Error exit delayed from previous errors.$')
        self.fails(w.tarsnap('-c', '-f', 'kept', '-C', w.root, 'tree'),
                   'An archive already exists with the name "kept"$',
                   'Error creating archive$', 'Error exit delayed')
        w.ok('-c', '-f', 'first', '-C', w.root, 'tree')
        done = w.tarsnap('-d', '-f', 'first', '-f', 'none')
        self.fails(done, 'Archive does not exist: none$',
                   'Error deleting archive$', 'Error exit delayed',
                   'server has changed', code=2)
        self.assertEqual(done.lines[2:], [DELAYED, CHANGED])

    def test_stored_with_an_error(self):
        w = self.world
        done = w.tarsnap('-c', '-f', 'partly', '-C', w.root, 'tree', 'none')
        self.assertEqual((done.code, done.lines[1:]), (2, [DELAYED, CHANGED]))
        self.assertRegex(done.lines[0], '^tarsnap: none: Cannot stat')
        w.ok('-d', '-f', 'partly')

    def test_names_keep_to_their_line(self):
        # They end no line of a log, and drive no terminal that shows it.
        w = self.world
        name = 'new\nline \x1b[31m\x9b \u20ac'
        shown = 'new\\012line \\033[31m\\302\\233 \u20ac'
        done = w.tarsnap('-c', '-f', 'lines', name, 'tree', cwd=w.root)
        self.assertEqual((done.code, done.lines), (2, [
            'tarsnap: %s: Cannot stat: No such file or directory' % shown,
            DELAYED, CHANGED]))
        done = w.tarsnap('-t', '-f', name)
        self.assertEqual(done.lines[0],
                         'tarsnap: Archive does not exist: ' + shown)
        w.ok('-c', '-f', name, 'tree', cwd=w.root)
        self.assertIn(' - %s, ' % shown, w.ok('--last-backup-age').out)
        self.assertEqual(w.ok('-d', '-v', '-f', name).lines,
                         ['Deleting archive "%s"' % shown])
        w.ok('-d', '-f', 'lines')

    def test_silent_on_success(self):
        w = self.world
        w.ok('-c', '-f', 'silent', '-C', w.root, 'tree')
        for words in (['--list-archives'], ['-t', '-f', 'silent'],
                      ['-x', '-f', 'silent', '-C', w.path('home')],
                      ['-r', '-f', 'silent'], ['--print-stats'], ['--fsck'],
                      ['--recover'], ['-d', '-f', 'silent']):
            with self.subTest(words):
                self.assertEqual(w.ok(*words).err, '')

    def test_keep_going(self):
        done = self.world.tarsnap('-d', '--keep-going', '-f', 'none')
        self.assertEqual((done.code, done.lines),
                         (0, ['tarsnap: Archive does not exist: none']))

    def test_killed(self):
        w = self.world
        os.mkfifo(w.path('fifo'))
        for number in (signal.SIGTERM, signal.SIGINT):
            # It waits for whoever writes the names.
            running = w.start('-t', '--archive-names', w.path('fifo'))
            with contextlib.suppress(OSError):
                while running.process.poll() is None:
                    try:
                        fd = os.open(w.path('fifo'),
                                     os.O_WRONLY | os.O_NONBLOCK)
                        break
                    except OSError:
                        time.sleep(0.02)
            running.send(number)
            done = running.wait()
            os.close(fd)
            self.assertEqual(done.code, -number)
            self.assertNotIn('Traceback', done.err)

    def test_the_store_is_not_archived(self):
        # Nor where it was moved to.
        w = self.world
        moved = w.path('moved')
        for where, words in ((w.address, []), (moved, ['--server', moved])):
            if words:
                os.rename(w.address, moved)
                self.addCleanup(os.rename, moved, w.address)
            said = w.ok('-c', '-f', 'store', *words, '-C', w.root, 'tree',
                        os.path.basename(where)).lines
            self.assertEqual(said, [
                'tarsnap: Not adding server directory to archive: '
                + os.path.basename(where)])
            self.assertEqual(w.ok('-t', '-f', 'store', *words).out,
                             'tree/\ntree/file\n')
            w.ok('-d', '-f', 'store', *words)

    def test_quiet(self):
        """The list of warnings that --quiet takes away, and no other."""
        w = self.world
        tree = w.path('tree')
        cases = [
            ("Removing leading '/'", [tree]),
            ('Not adding cache directory to archive: ', [w.path('cache')]),
            ('contains no files', ['-C', tree, '--exclude', '*', 'file'])]
        if os.path.isdir('/proc/self'):
            others = [word for name in os.listdir('/') if name != 'proc'
                      for word in ('--exclude', '/' + name)]
            cases.append(('Not descending into filesystem of type proc',
                          others + ['/']))
        for text, operands in cases:
            words = ['-c', '--dry-run', *operands]
            with self.subTest(text):
                done = w.ok(*words)
                self.assertIn(text, done.err)
                done = w.ok('--quiet', *words)
                self.assertEqual(done.err, '')
                done = w.ok('--no-quiet', *words)
                self.assertIn(text, done.err)
        done = w.tarsnap('--quiet', '-c', '--dry-run', '-C', tree, 'none')
        self.assertIn('none: Cannot stat', done.err)

    def test_c_locale_from_cron(self):
        # Names of any bytes, no HOME, standard input shut, no terminal.
        w = self.world
        odd = os.fsencode(w.path('odd'))
        os.mkdir(odd)
        for name in (b'\xc3\xbc', b'\xff\xfe'):
            world.write(os.path.join(odd, name), name)
        env = {'PATH': os.environ['PATH'], 'LC_ALL': 'C',
               'PYTHONCOERCECLOCALE': '0'}
        archive = b'n\xc3\xa4me\xff'

        def cron(*words):
            done = subprocess.run(
                ['sh', '-c', 'exec "$@" <&-', 'sh'] + w.argv(words), env=env,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True)
            self.assertEqual(done.stderr.replace(b'tarsnap: ', b''), b'')
            self.assertEqual(done.returncode, 0)
            return done.stdout
        cron('-c', '-f', archive, '-C', odd, '.')
        self.assertIn(archive, cron('--list-archives').split(b'\n'))
        self.assertEqual(set(cron('-t', '-f', archive).split(b'\n')),
                         {b'./', b'./\xc3\xbc', b'./\\377\\376', b''})
        cron('-d', '-f', archive)


if __name__ == '__main__':
    unittest.main()
