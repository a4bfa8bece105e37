# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What goes wrong is said in one clear line, and nothing stored is harmed.

Each failure must have the exit status of the contract, one line on the cause,
then, if the mode had begun, its line and `Error exit delayed from previous
errors.`; never a traceback.  After each test the archive made before all of
them is extracted.
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import unittest

import world

DELAYED = 'tarsnap: Error exit delayed from previous errors.'
FULL = 'tarsnap: Cannot write to standard output: No space left on device'
MODE_LINES = {
    '-c': 'tarsnap: Error creating archive',
    '-d': 'tarsnap: Error deleting archive',
    '-t': 'tarsnap: Error reading archive',
    '-x': 'tarsnap: Error extracting archive',
    '-r': 'tarsnap: Error reading archive',
    '--list-archives': 'tarsnap: Error listing archives',
    '--print-stats': 'tarsnap: Error generating archive statistics',
    '--fsck': 'tarsnap: Error fscking archives',
    '--recover': 'tarsnap: Error recovering archive',
    '--initialize-cachedir': 'tarsnap: Error initializing cache directory',
    '--nuke': 'tarsnap: Error nuking archives'}
CHANGED = 'tarsnap: The server has changed what it stores nevertheless.'


class BadInput(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'tls')
        world.tree_small(w.path('tree'), world.seed_choose('BadInput'), 12)
        w.keygen()
        w.ok('-c', '-f', 'kept', '-C', w.root, 'tree')
        # A copy that tests may harm without harming each other.
        shutil.copytree(w.path('cache'), w.path('pristine'), symlinks=True)
        cls.environment = dict(w.environment)

    def setUp(self):
        w = self.world
        w.environment = dict(self.environment)
        self.cache = w.path('cache%d' % w.clock)
        shutil.copytree(w.path('pristine'), self.cache, symlinks=True)

    def tearDown(self):
        w = self.world
        w.environment = dict(self.environment)
        where = w.extract('kept', 'tree/d1', cache=None)
        self.assertEqual(
            set(world.tree_scan(os.path.join(where, 'tree', 'd1'))),
            set(world.tree_scan(w.path('tree', 'd1'))))

    def tarsnap(self, *args, **options):
        return self.world.tarsnap(*args, **dict({'cache': self.cache},
                                                **options))

    def create(self, name, *args, **options):
        return self.tarsnap('-c', '-f', name, *args, '-C', self.world.root,
                            'tree', **options)

    def check(self, done, cause, code=1, mode=None):
        """One line on the cause; with `mode`, its line and the last one."""
        self.assertEqual(done.code, code, done)
        self.assertNotIn('Traceback', done.err)
        lines = done.lines
        self.assertRegex(lines[0], '^tarsnap: .*' + cause)
        self.assertEqual(lines[1:], [MODE_LINES[mode], DELAYED] if mode
                         else [], done)

    def check_usage(self, done, cause):
        """A wrong command line: one line and the short usage."""
        self.assertEqual((done.code, done.out), (1, ''), done)
        self.assertRegex(done.lines[0], '^tarsnap: .*' + cause)
        self.assertRegex(done.lines[1], '^usage: ')
        self.assertNotIn(DELAYED, done.lines)
        self.assertNotIn('Traceback', done.err)

    # Keys.

    def keygen_fails(self, cause, *words, give=world.PASSWORD):
        w, path = self.world, self.world.path('unborn')
        done = w.tool('keygen', '--keyfile', path, '--machine', 'm',
                      '--server', w.address, *words, give=give.encode())
        self.assertEqual((done.code, done.out), (1, ''), done)
        self.assertEqual(len(done.lines), 1, done)
        self.assertRegex(done.err, '^tarsnap-keygen: .*' + cause)
        self.assertFalse(os.path.exists(path))

    def test_wrong_account_or_password(self):
        pin = ['--fingerprint', self.world.server.pin]
        self.keygen_fails('password is incorrect', '--user', world.USER, *pin,
                          give='guess')
        self.keygen_fails('No user', '--user', 'nobody@example.org', *pin)

    def test_wrong_fingerprint(self):
        self.keygen_fails('is not the server meant', '--user', world.USER,
                          '--fingerprint', '00' * 32)
        self.keygen_fails('has the fingerprint %s' % self.world.server.pin,
                          '--user', world.USER)

    def test_another_server_than_the_key_was_made_with(self):
        other = world.World(self, 'tls', other=True)
        for args in (['--list-archives'],
                     ['-c', '-f', 'x', '-C', self.world.root, 'tree']):
            self.check(self.tarsnap('--server', other.address, *args),
                       'is not the server this key was made with',
                       mode=args[0])

    def test_passphrase(self):
        w = self.world
        done = w.tool('keymgmt', '--outkeyfile', w.path('locked'), '-r', '-w',
                      '--passphrased', '--passphrase-mem', '10M',
                      '--passphrase-time', '0.05', '--new-passphrase',
                      'env:SECRET', w.key,
                      env=dict(w.environment, SECRET='open sesame'))
        self.assertEqual(done.code, 0, done)
        locked = {'key': w.path('locked')}
        done = self.tarsnap('--list-archives', '--passphrase',
                            'dev:stdin-once', give=b'open sesame\n', **locked)
        self.assertEqual((done.code, done.out.splitlines()[0]),
                         (0, 'kept'), done)
        self.check(self.tarsnap('--list-archives', '--passphrase',
                                'dev:stdin-once', give=b'guess\n', **locked),
                   'Passphrase is incorrect')
        self.check(self.tarsnap('--list-archives', '--passphrase',
                                'env:UNSET', **locked), 'UNSET')
        self.check(self.tarsnap('--list-archives', '--passphrase',
                                'telepathy:x', **locked), 'telepathy')
        done = self.tarsnap('--list-archives', give=b'', **locked)
        self.assertEqual((done.code, done.out), (1, ''))
        self.assertNotIn('Traceback', done.err)

    def test_damaged_key_file(self):
        w = self.world
        with open(w.key, 'rb') as file:
            good = file.read()
        middle = len(good) // 2
        flipped = b'B' if good[middle:middle + 1] != b'B' else b'C'
        for what, data in (
                ('empty', b''), ('cut', good[:middle]),
                ('flipped', good[:middle] + flipped + good[middle + 1:]),
                ('text', b'not a key\n'), ('noise', world.noise(4000, 1)),
                ('head', good.splitlines(True)[0])):
            with self.subTest(what):
                world.write(w.path('damaged'), data)
                self.check(self.tarsnap('--list-archives',
                                        key=w.path('damaged')), 'damaged')
        self.check(self.tarsnap('--list-archives', key=w.path('no key')),
                   'no key.*No such file')
        self.check(self.tarsnap('--list-archives', key=w.root),
                   re.escape(w.root) + '.*[Ii]s a directory')
        self.check(self.tarsnap('--list-archives', key=None),
                   'Key file must be specified')

    def test_key_of_another_machine(self):
        w = self.world
        other = w.keygen('other%d' % w.clock)
        for args, mode in ((['-c', '-f', 'x', '-C', w.root, 'tree'], '-c'),
                           (['-d', '-f', 'kept'], '-d'),
                           (['--print-stats'], '--print-stats')):
            self.check(self.tarsnap(*args, key=other),
                       'belongs to the key of another machine', mode=mode)
        self.assertEqual(self.tarsnap('--list-archives', key=other,
                                      cache=None).out, '')

    def test_missing_roles(self):
        w = self.world
        keys = {role: w.subset('role%s%d' % (role, w.clock), role)
                for role in ('-r', '-w', '--prune', '--nuke')}
        none = {'-c': ['-f', 'x', '-C', w.root, 'tree'],
                '-d': ['-f', 'kept'], '-t': ['-f', 'kept'],
                '-x': ['-f', 'kept', '-C', w.path('home')],
                '-r': ['-f', 'kept'], '--list-archives': [],
                '--print-stats': ['-f', 'kept'], '--nuke': [],
                '--fsck': [], '--recover': []}
        for role, modes, need in (
                ('-r', ['-c'], 'write'),
                ('-r', ['-d'], 'delete'), ('-r', ['--nuke'], 'delete|nuke'),
                ('-r', ['--fsck', '--recover'], 'write|delete'),
                ('-w', ['-t', '-x', '-r', '--list-archives', '--print-stats'],
                 'read'), ('-w', ['-d'], 'delete'),
                ('-w', ['--nuke'], 'delete|nuke'),
                ('--prune', ['-c'], 'write'),
                ('--prune', ['-t', '-x', '-r'], 'read'),
                ('--prune', ['--nuke'], 'delete|nuke'),
                ('--nuke', ['-c'], 'write'), ('--nuke', ['-d'], 'delete'),
                ('--nuke', ['-t', '-x', '-r', '--list-archives'], 'read')):
            for mode in modes:
                with self.subTest(role=role, mode=mode):
                    done = self.tarsnap(mode, *none[mode], key=keys[role],
                                        give=b'No Tomorrow\n')
                    self.check(done, '(%s) authorization' % need,
                               mode=mode)
        self.assertEqual(os.listdir(w.path('home')), [])

    # Archives.

    def test_unknown_archive(self):
        w = self.world
        for mode in ('-d', '-t', '-x', '-r', '--print-stats'):
            with self.subTest(mode):
                self.check(self.tarsnap(mode, '-f', 'no such', *(
                    ['-C', w.path('home')] if mode == '-x' else [])),
                    'Archive does not exist: no such$', mode=mode)
        done = self.tarsnap('-d', '-f', 'no such', '--keep-going')
        self.assertEqual((done.code, done.lines), (
            0, ['tarsnap: Archive does not exist: no such']))

    def test_existing_archive(self):
        done = self.create('kept')
        self.check(done, 'An archive already exists with the name "kept"$',
                   mode='-c')
        self.assertTrue(done.err.startswith(
            'tarsnap: An archive already exists with the name '))

    def test_archive_names(self):
        for name, cause in (('', '1 to 1023'), ('x' * 1024, '1 to 1023')):
            self.check(self.create(name), cause)
        for name in ('x' * 1023, 'new\nline', '\udcff\udcfe', ' ', '*', 'a/b'):
            done = self.create(name)
            self.assertEqual((done.code, done.err), (0, ''))
            done = self.tarsnap('-t', '-f', name, 'tree/d1/link')
            self.assertEqual((done.code, done.out), (0, 'tree/d1/link\n'))
            done = self.tarsnap('-d', '-f', name)
            self.assertEqual((done.code, done.err), (0, ''))

    def test_missing_operands(self):
        w = self.world
        done = self.tarsnap('-t', '-f', 'kept', 'tree/d1/link', 'nothing')
        self.assertEqual((done.code, done.out), (1, 'tree/d1/link\n'))
        self.assertIn('tarsnap: nothing: Not found in archive', done.lines)
        done = self.tarsnap('-c', '-f', 'partly', '-C', w.root, 'nothing',
                            'tree')
        self.assertEqual(done.code, 2, done)
        self.assertEqual(done.lines, ['tarsnap: nothing: Cannot stat: No such '
                                      'file or directory', DELAYED, CHANGED])
        self.assertIn('partly', w.names())
        self.check(self.tarsnap('-c', '-f', 'x'), 'No files or directories',
                   mode='-c')
        self.check(self.tarsnap('-c', '-f', 'x', '-C', '/no such', 'y'),
                   'Cannot change to directory', mode='-c')
        self.check(self.tarsnap('-x', '-f', 'kept', '-C', '/no such'),
                   'Cannot change to directory', mode='-x')

    # Cache directories.

    def test_corrupt_directory(self):
        path = os.path.join(self.cache, 'directory')
        size = os.path.getsize(path)
        for what in ('empty', 'noise', 'torn', 'cut'):
            with self.subTest(what):
                shutil.copy(self.world.path('pristine', 'directory'), path)
                with open(path, 'r+b') as file:
                    if what == 'empty':
                        file.truncate(0)
                    elif what == 'noise':
                        file.write(world.noise(size, 1))
                    elif what == 'torn':
                        file.seek(100)
                        file.write(world.noise(3000, 2))
                    else:
                        file.truncate(size // 2)
                done = self.create('x')
                if what == 'empty':
                    self.check(done, 'Run --fsck', mode='-c')
                else:
                    self.check(done, 'Error reading cache directory .*--fsck',
                               mode='-c')
                    self.check(self.tarsnap('--print-stats'),
                               'Error reading cache directory .*--fsck',
                               mode='--print-stats')
        # Deeper down it shows late, or never.
        shutil.copy(self.world.path('pristine', 'directory'), path)
        with open(path, 'r+b') as file:
            file.seek(size // 3)
            file.write(world.noise(size // 3, 4))
        done = self.create('deep')
        if done.code:
            self.check(done, 'Error reading cache directory .*--fsck',
                       mode='-c')
        done = self.tarsnap('--fsck')
        self.assertEqual((done.code, done.err), (0, ''))
        self.assertEqual(self.create('mended').code, 0)
        self.assertEqual(self.tarsnap('-d', '--keep-going', '-f', 'mended',
                                      '-f', 'deep').code, 0)

    def test_unreadable_directory(self):
        os.unlink(os.path.join(self.cache, 'directory'))
        os.mkdir(os.path.join(self.cache, 'directory'))
        self.check(self.create('x'), 'Error reading cache directory',
                   mode='-c')

    def test_lost_directory(self):
        os.unlink(os.path.join(self.cache, 'directory'))
        self.check(self.create('x'), 'Run --fsck', mode='-c')
        self.check(self.tarsnap('-d', '-f', 'kept'), '--fsck', mode='-d')
        self.check(self.tarsnap('--print-stats'),
                   'Error reading cache directory .*--fsck',
                   mode='--print-stats')

    def test_corrupt_memo_is_ignored(self):
        for number, data in enumerate((b'', world.noise(20000, 3),
                                       b'SQLite format 3\0' + bytes(4000))):
            with open(os.path.join(self.cache, 'cache'), 'wb') as file:
                file.write(data)
            name = 'memo%d.%d' % (number, self.world.clock)
            done = self.create(name)
            self.assertEqual((done.code, done.err), (0, ''))
            self.assertEqual(self.tarsnap('-d', '-f', name).code, 0)

    def test_corrupt_pending(self):
        for number, data in enumerate((b'', world.noise(20000, 3))):
            with open(os.path.join(self.cache, 'pending'), 'wb') as file:
                file.write(data)
            name = 'pending%d.%d' % (number, self.world.clock)
            done = self.create(name)
            self.assertEqual((done.code, done.err), (0, ''))
            self.assertEqual(self.tarsnap('-d', '-f', name).code, 0)

    def test_cachedir_is_no_directory(self):
        world.write(self.world.path('a file'), b'')
        argv = self.world.argv(
            ['--cachedir', self.world.path('a file'), '-c', '-f', 'x', '-C',
             self.world.root, 'tree'], cache=None)
        self.check(self.world.run(argv), 'a file')

    def test_no_cachedir(self):
        for args in (['-c', '-f', 'x', 'tree'], ['-d', '-f', 'kept'],
                     ['--print-stats'], ['--fsck'], ['--recover'],
                     ['--initialize-cachedir']):
            self.check(self.tarsnap(*args, cache=None),
                       'Cache directory must be specified')

    def test_cachedir_in_use(self):
        with open(os.path.join(self.cache, 'lockf'), 'r+b') as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            for args, mode in (
                    (['-c', '-f', 'x', '-C', self.world.root, 'tree'], '-c'),
                    (['-d', '-f', 'kept'], '-d'), (['--fsck'], '--fsck')):
                self.check(self.tarsnap(*args),
                           'Transaction already in progress', mode=mode)
            for args in (['-t', '-f', 'kept'], ['--list-archives'],
                         ['--print-stats']):
                self.assertEqual(self.tarsnap(*args).code, 0)
        with open(os.path.join(self.cache, 'lockf'), 'r+b') as file:
            # Others hold flock on this very file around the whole run.
            fcntl.flock(file, fcntl.LOCK_EX)
            self.assertEqual(self.tarsnap('-d', '--keep-going', '-f',
                                          'no such').code, 0)

    def test_initialize_cachedir(self):
        path = self.world.path('made', 'deep')
        argv = self.world.argv(['--initialize-cachedir', '--cachedir', path],
                               cache=None)
        done = self.world.run(argv)
        self.assertEqual(done.code, 0, done)
        self.assertEqual([line.count('created for') for line in done.lines],
                         [1, 1])
        self.assertEqual(os.stat(path).st_mode & 0o7777, 0o700)
        self.check(self.tarsnap('--initialize-cachedir'), 'in use',
                   mode='--initialize-cachedir')

    # Room.

    def small_disk(self, size):
        """A directory on a file system of its own of `size` bytes."""
        if os.geteuid():
            self.skipTest('a small file system takes root')
        path = self.world.path('disk%d' % self.world.clock)
        os.mkdir(path)
        if subprocess.call(['mount', '-t', 'tmpfs', '-o', 'size=%d' % size,
                            'tmpfs', path], stderr=subprocess.DEVNULL):
            self.skipTest('tmpfs cannot be mounted here')
        self.addCleanup(subprocess.call, ['umount', path])
        return path

    def test_no_space_in_the_store(self):
        w = world.World(self, 'dir')
        disk = BadInput.small_disk(self, 12 * world.MIB)
        w.address = os.path.join(disk, 'store')
        w.keygen()
        world.tree_noise(w.path('little'), 1, 2)
        world.tree_noise(w.path('much'), 2, 24)
        w.ok('-c', '-f', 'little', '-C', w.root, 'little')
        for _ in range(2):
            done = w.tarsnap('-c', '-f', 'much', '-C', w.root, 'much')
            self.check(done, 'No space left on device', mode='-c')
        world.tree_equal(self, w.path('little'), os.path.join(
            w.extract('little'), 'little'))
        self.assertEqual(w.names(), ['little'])
        # It goes on once there is room.
        subprocess.check_call(['mount', '-o', 'remount,size=64m', disk])
        w.ok('-c', '-f', 'much', '-C', w.root, 'much')
        world.tree_equal(self, w.path('much'), os.path.join(
            w.extract('much'), 'much'))

    def test_no_space_in_the_cache_directory(self):
        w = self.world
        disk = self.small_disk(300 * world.KIB)
        cache = os.path.join(disk, 'cache')
        shutil.copytree(w.path('pristine'), cache, symlinks=True)
        for number in range(2000):
            world.write(w.path('wide', '%02d' % (number % 20),
                               'a rather long name %d' % number),
                        b'%d' % number)
        done = self.tarsnap('-c', '-f', 'wide', '-C', w.root, 'wide',
                            cache=cache)
        self.assertIn(done.code, (1, 2), done)
        self.assertNotIn('Traceback', done.err)
        self.assertRegex(done.lines[0], '^tarsnap: .*%s.*(full|No space)'
                         % re.escape(cache))
        self.assertEqual(done.lines[-1], DELAYED)
        subprocess.check_call(['mount', '-o', 'remount,size=64m', disk])
        done = self.tarsnap('-c', '-f', 'roomy', '-C', w.root, 'wide',
                            cache=cache)
        self.assertEqual(done.code, 0, done)
        world.tree_equal(self, w.path('wide'), os.path.join(
            w.extract('roomy', cache=None), 'wide'))
        for name in set(w.names()) & {'wide', 'roomy'}:
            self.assertEqual(self.tarsnap('-d', '-f', name,
                                          cache=cache).code, 0)

    # Servers.

    def test_port_in_use(self):
        w = self.world
        done = w.run([sys.executable, w.program('tarsnapd'),
                      'serve', w.server.path, '--listen', w.address])
        self.assertEqual((done.code, done.out), (1, ''))
        self.assertRegex(done.err, r'\Atarsnapd: .*in use\n\Z')

    def test_nothing_listens(self):
        with socket.create_server(('127.0.0.1', 0)) as free:
            address = '127.0.0.1:%d' % free.getsockname()[1]
        self.check(self.tarsnap('--list-archives', '--server', address),
                   'Too many network failures: .*refused',
                   mode='--list-archives')
        self.check(self.create('x', '--server', address),
                   'Too many network failures', mode='-c')

    def test_wrong_addresses(self):
        for address, cause in (
                ('localhost', 'Cannot obtain server address'),
                ('no.such.host.invalid:9279', 'Error looking up'),
                ('127.0.0.1:99999', 'Cannot obtain server address'),
                ('ssh://', 'Cannot obtain server address'),
                ('/no such directory', 'no such directory'),
                (self.world.path('tree'), 'not a server directory')):
            with self.subTest(address):
                self.check(self.tarsnap('--list-archives', '--server',
                                        address),
                           cause, mode='--list-archives')

    def test_something_else_answers(self):
        for talk in (b'', b'SSH-2.0-OpenSSH_9.2\r\n',
                     b'HTTP/1.0 400 Bad Request\r\n\r\n'):
            with socket.create_server(('127.0.0.1', 0)) as listener:
                def answer(listener=listener, talk=talk):
                    for _ in range(3):
                        client = listener.accept()[0]
                        client.sendall(talk)
                        client.recv(4096)
                        client.close()
                thread = threading.Thread(target=answer, daemon=True)
                thread.start()
                done = self.tarsnap(
                    '--list-archives', '--server', '127.0.0.1:%d'
                    % listener.getsockname()[1])
                self.check(done, 'Too many network failures: Cannot speak TLS',
                           mode='--list-archives')
                thread.join(10)

    # The command line.

    def test_usage_errors(self):
        for args, cause in (
                ([], 'Must specify one of'),
                (['--bogus'], '--bogus'), (['-Z'], '-Z'),
                (['-c', '-x', '-f', 'x'], '-x'),
                (['-c', '-f'], '-f'), (['--list-archives=1'], 'list-archives'),
                (['-c', '--quiet', '--no-quiet', '-f', 'x', 'y'], 'quiet'),
                (['--no-'], '--no-'),
                (['-c', '-f', 'x', ''], 'operand')):
            with self.subTest(args):
                self.check_usage(self.tarsnap(*args), cause)

    def test_wrong_values(self):
        for args, cause in (
                (['-c', '--checkpoint-bytes', '5', '-f', 'x', 'y'],
                 'checkpoint-bytes'),
                (['-c', '--checkpoint-bytes', 'lots', '-f', 'x', 'y'], 'lots'),
                (['-c', '--creationtime', 'noon', '-f', 'x', 'y'], 'noon'),
                (['-x', '--strip-components', '-', '-f', 'x'], 'strip-comp'),
                (['-c', '-f', 'x', '-C', '', 'y'], '-C'),
                (['-t', '--no-pad', '-f', 'x'], '--no-pad'),
                (['--list-archives', '--strip-components', '1'],
                 '--strip-components'),
                (['-t', '-f', 'x', '-f', 'y'], 'one archive'),
                (['-d', '-f', 'x', 'y'], 'operands: y'),
                (['--list-archives', 'y'], 'operands: y'),
                (['-t'], 'Archive name must be specified'),
                (['--configfile', '/no such', '--list-archives'],
                 '/no such: No such file')):
            with self.subTest(args):
                self.check(self.tarsnap(*args), cause)

    def test_wrong_configuration(self):
        path = self.world.path('conf')
        for text, cause in ((b'bogus\n', 'conf:1.*bogus'),
                            (b'\nkeyfile\n', 'conf:2.*keyfile'),
                            (b'quiet yes\n', 'conf:1.*quiet'),
                            (b'checkpoint-bytes x\n', 'conf:1.*x'),
                            (b'\xff\xfe\n', 'conf:1')):
            world.write(path, text)
            self.check(self.tarsnap('--configfile', path, '-c', '--dry-run',
                                    '-f', 'x', 'y'), cause)

    # Files.

    def test_unreadable_file(self):
        if os.geteuid() == 0 and not shutil.which('setpriv'):
            self.skipTest('setpriv is missing')
        w = self.world
        where = w.path('nobody')
        os.makedirs(where)
        shutil.copytree(w.path('tree'), os.path.join(where, 'tree'),
                        symlinks=True)
        shutil.copytree(self.cache, os.path.join(where, 'cache'),
                        symlinks=True)
        shutil.copy(w.key, where)
        os.makedirs(os.path.join(where, 'tree', 'shut'))
        world.write(os.path.join(where, 'tree', 'shut', 'x'), b'x')
        os.chmod(os.path.join(where, 'tree', 'shut'), 0)
        os.chmod(os.path.join(where, 'tree', 'd1', 'f1'), 0)
        # Root without the right to pass over modes; as another user it could
        # not run an interpreter that is in root's home.
        prefix = [] if os.geteuid() else [
            'setpriv', '--bounding-set', '-dac_override,-dac_read_search']

        def run(*args):
            return w.run(prefix + w.argv(
                args, key=os.path.join(where, 'key'),
                cache=os.path.join(where, 'cache')), cwd=where)

        name = 'nobody%d' % w.clock
        file = 'tarsnap: tree/d1/f1: Cannot read: Permission denied'
        directory = ('tarsnap: tree/shut: Cannot read directory: Permission '
                     'denied')
        done = run('-c', '-f', name + '1', '-C', where, 'tree')
        self.assertEqual((done.code, done.lines), (
            2, [file, directory, DELAYED, CHANGED]))
        os.chmod(os.path.join(where, 'tree', 'd1', 'f1'), 0o600)
        done = run('-c', '-f', name + '2', '-C', where, 'tree')
        self.assertEqual((done.code, done.lines), (
            2, [directory, DELAYED, CHANGED]))
        os.chmod(os.path.join(where, 'tree', 'd1', 'f1'), 0)
        os.chmod(os.path.join(where, 'tree', 'shut'), 0o700)
        done = run('-c', '-f', name + '3', '-C', where, 'tree')
        self.assertEqual((done.code, done.lines), (
            2, [file, DELAYED, CHANGED]))
        os.chmod(os.path.join(where, 'tree', 'd1', 'f1'), 0o600)
        source = world.tree_scan(os.path.join(where, 'tree'))
        copy = os.path.join(w.extract(name + '1', cache=None), 'tree')
        os.chmod(os.path.join(copy, 'shut'), 0o700)
        found = world.tree_scan(copy)
        self.assertEqual(set(source) - set(found), {b'd1/f1', b'shut/x'})
        # Now that they can be read, they are, although nothing else changed.
        done = run('-c', '-f', name + '4', '-C', where, 'tree')
        self.assertEqual((done.code, done.err), (0, ''), done)
        world.tree_equal(self, os.path.join(where, 'tree'), os.path.join(
            w.extract(name + '4', cache=None), 'tree'))

    @unittest.skipIf(os.geteuid() == 0 and not shutil.which('setpriv'),
                     'setpriv is missing')
    def test_shut_directory_with_attributes(self):
        # What is known of it is stored: its owner, mode and times.
        w = self.world
        where = w.path('tagged')
        shut = os.path.join(where, 'tree', 'shut')
        os.makedirs(shut)
        try:
            os.setxattr(shut, 'user.x', b'1')
        except OSError as e:
            self.skipTest('extended attributes: %s' % e.strerror)
        shutil.copytree(self.cache, os.path.join(where, 'cache'),
                        symlinks=True)
        os.utime(shut, (1234567890, 1234567890))
        os.chmod(shut, 0o200)
        prefix = [] if os.geteuid() else [
            'setpriv', '--bounding-set', '-dac_override,-dac_read_search']
        argv = w.argv(['-c', '-f', 'tagged', '-C', where, 'tree'],
                      cache=os.path.join(where, 'cache'))
        done = w.run(prefix + argv)
        # What walks is ahead of what reads.
        self.assertEqual((done.code, sorted(done.lines[:2]), done.lines[2:]), (
            2, ['tarsnap: tree/shut: Cannot read directory: Permission denied',
                'tarsnap: tree/shut: Cannot read extended attributes: '
                'Permission denied'], [DELAYED, CHANGED]))
        copy = os.stat(os.path.join(w.extract('tagged', cache=None), 'tree',
                                    'shut'))
        self.assertEqual((copy.st_mode & 0o7777, copy.st_mtime),
                         (0o200, 1234567890))
        os.chmod(shut, 0o700)

    @unittest.skipIf(os.geteuid() == 0 and not shutil.which('setpriv'),
                     'setpriv is missing')
    def test_restored_twice_over_a_shut_directory(self):
        # Its owner may open it, and finds it shut again.
        w = self.world
        where = w.path('shut twice')
        world.write(os.path.join(where, 'box', 'below', 'x'), b'x')
        os.chmod(os.path.join(where, 'box', 'below'), 0o100)
        os.chmod(os.path.join(where, 'box'), 0o311)
        self.assertEqual(self.tarsnap('-c', '-f', 'shut twice', '-C', where,
                                      'box').code,
                         0 if os.geteuid() == 0 else 2)
        to = w.path('shut to')
        os.mkdir(to)
        prefix = [] if os.geteuid() else [
            'setpriv', '--bounding-set', '-dac_override,-dac_read_search']
        for more in ((), (), ('--resume-extract',), ('-U',)):
            done = w.run(prefix + w.argv(
                ['-x', '-p', '-f', 'shut twice', '-C', to, *more],
                cache=None))
            self.assertEqual((done.code, done.err), (0, ''), (more, done))
        if os.geteuid() == 0:
            world.tree_equal(self, os.path.join(where, 'box'),
                             os.path.join(to, 'box'))
        for top in (where, to):
            os.chmod(os.path.join(top, 'box'), 0o700)
            os.chmod(os.path.join(top, 'box', 'below'), 0o700)

    def test_vanishing_file(self):
        # It goes at the first PUT, when its directory was read; the client
        # cannot be more than 8 MiB in its window and 7 in its queue ahead.
        w = world.World(self, 'front')
        world.tree_noise(w.path('tree'), 5, 24)
        w.keygen()
        removed = threading.Event()

        def hook(wire, up, kind, body):
            if kind == world.PUT and not removed.is_set():
                removed.set()
                os.unlink(w.path('tree', '0120'))
            return world.PASS

        w.front.hook = hook
        done = w.tarsnap('-c', '-f', 'x', '-C', w.root, 'tree')
        self.assertTrue(removed.is_set())
        self.assertEqual((done.code, done.lines), (2, [
            'tarsnap: tree/0120: Cannot stat: No such file or directory',
            DELAYED, CHANGED]), done)
        world.tree_equal(self, w.path('tree'), os.path.join(
            w.extract('x'), 'tree'))

    # Descriptors and environment.

    def test_closed_descriptors(self):
        w = self.world
        for closed in ('<&-', '>&-', '2>&-', '<&- >&-', '<&- >&- 2>&-'):
            for number, args in enumerate((
                    ['-c', '-f', 'closed', '-C', w.root, 'tree'],
                    ['-t', '-f', 'kept'], ['--list-archives'],
                    ['-d', '-f', 'closed'])):
                with self.subTest(closed=closed, args=args[0]):
                    argv = w.argv(args, cache=self.cache)
                    done = w.run(['sh', '-c', '"$@" ' + closed, 'sh'] + argv)
                    self.assertNotIn('Traceback', done.err + done.out)
                    reads = number in (1, 2) and '>&-' in closed.replace(
                        '2>&-', '')
                    self.assertIn(done.code, (0, 1) if reads else (0,), done)

    def test_full_standard_output(self):
        for args in (['-t', '-f', 'kept'], ['--list-archives'],
                     ['-r', '-f', 'kept'], ['--print-stats'], ['--usage'],
                     ['--fsck'], ['--print-head'],
                     ['-x', '-O', '-f', 'kept']):
            with self.subTest(args):
                argv = self.world.argv(args, cache=self.cache)
                done = self.world.run(
                    ['sh', '-c', '"$@" >/dev/full', 'sh'] + argv)
                self.assertEqual(done.code, 1, done)
                self.assertNotIn('Traceback', done.err)
                self.assertNotIn('Exception', done.err)
                self.assertEqual(done.lines[0], FULL)
                self.assertEqual(done.lines[-1], DELAYED)
        for args, code in ((['--version'], 1), (['--help'], 1),
                           (['--last-backup-age'], 3),
                           (['--last-backup-age', '--json'], 3),
                           (['--last-backup-age', '--max-age', 'x'], 3)):
            with self.subTest(args):
                argv = self.world.argv(args, cache=self.cache)
                done = self.world.run(
                    ['sh', '-c', '"$@" >/dev/full', 'sh'] + argv)
                self.assertEqual(done.code, code, done)
                self.assertIn(FULL.split(': ', 1)[1], done.lines[0])

    def test_full_standard_error(self):
        # Nobody's backup stops because the disk of its log is full.
        w = self.world
        where = w.path('mute')
        os.mkdir(where)
        for args in (['-c', '-v', '-f', 'mute', '-C', w.root, 'tree'],
                     ['-c', '-vv', '--progress-bytes', '1k', '-f', 'mute2',
                      '-C', w.root, 'tree'],
                     ['-x', '-v', '--progress-bytes', '1k', '-f', 'mute',
                      '-C', where],
                     ['-x', '--json', '--progress-bytes', '1k', '-f', 'mute',
                      '-C', where],
                     ['-d', '-v', '-f', 'mute', '-f', 'mute2'],
                     ['--list-archives', '--dump-config']):
            with self.subTest(args):
                argv = w.argv(args, cache=self.cache)
                done = w.run(['sh', '-c', '"$@" 2>/dev/full', 'sh'] + argv)
                self.assertEqual(done.code, 0, done)
        world.tree_equal(self, w.path('tree'), os.path.join(where, 'tree'))
        # But statistics were asked for.
        argv = w.argv(['-c', '--dry-run', '--print-stats', '-C', w.root,
                       'tree'], cache=self.cache)
        done = w.run(['sh', '-c', '"$@" 2>/dev/full', 'sh'] + argv)
        self.assertEqual(done.code, 1, done)

    def test_broken_pipe(self):
        w = self.world
        for args in (['-t', '-f', 'kept'], ['-r', '-f', 'kept'],
                     ['-x', '-O', '-f', 'kept']):
            argv = w.argv(args, cache=self.cache)
            done = w.run(['sh', '-c', '"$@" | head -c 10', 'sh'] + argv)
            self.assertEqual((done.code, len(done.raw)), (0, 10))
            self.assertNotIn('Traceback', done.err)
            self.assertNotIn('Exception', done.err)
            self.assertLessEqual(len(done.lines), 3, done)

    def test_bare_environment(self):
        w = self.world
        world.write(os.path.join(os.fsencode(w.path('bytes')),
                                 'ü€\udcff'.encode('utf-8',
                                                   'surrogateescape')), b'x')
        listing = []
        for number, env in enumerate((
                {}, {'LANG': 'C'}, {'LC_ALL': 'C', 'HOME': '/no such'},
                {'LC_ALL': 'C', 'PYTHONUTF8': '0',
                 'PYTHONCOERCECLOCALE': '0'},
                {'LC_ALL': 'C.UTF-8', 'PYTHONIOENCODING': 'ascii'},
                {'LC_ALL': 'C', 'PYTHONIOENCODING': 'utf-16'},
                {'LC_ALL': 'C.UTF-8'})):
            env = dict(env, PATH=os.environ.get('PATH', ''), TZ='UTC')
            name = 'ünicode%d' % number
            done = self.tarsnap('-c', '-v', '-f', name, '-C', w.root, 'bytes',
                                env=env)
            self.assertEqual(done.code, 0, done)
            self.assertEqual(len(done.lines), 2, done)
            done = self.tarsnap('-t', '-f', name, env=env)
            self.assertEqual((done.code, done.err), (0, ''), done)
            listing.append(done.raw.splitlines()[1])
            done = self.tarsnap('--list-archives', env=env)
            self.assertIn(name, done.out.splitlines())
            where = w.extract(name, env=env, cache=None)
            world.tree_equal(self, w.path('bytes'),
                             os.path.join(where, 'bytes'))
            self.assertEqual(self.tarsnap('-d', '-f', name, env=env).code, 0)
        self.assertEqual(listing, listing[-1:] * len(listing))

    def test_ended_by_signals(self):
        # Waiting for a passphrase, or for a server that says nothing.
        with socket.create_server(('127.0.0.1', 0)) as silent:
            address = '127.0.0.1:%d' % silent.getsockname()[1]
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                running = self.world.start('--list-archives', '--server',
                                           address, cache=None)
                client = silent.accept()[0]
                running.send(number)
                done = running.wait()
                client.close()
                self.assertEqual(done.code, -number, done)
                self.assertNotIn('Traceback', done.err)


if __name__ == '__main__':
    unittest.main()
