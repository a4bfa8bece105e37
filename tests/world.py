# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A world for the end-to-end tests: a store, keys, trees, and a cruel wire.

The programs run as their users run them: processes, by path, in a temporary
directory that holds all there is.  `World` has the programs, `Server` a server
process, `Front` what stands between: it ends the TLS in front of the server,
so it sees frames and may count, hold, swallow or cut them.  tree_*() build and
compare trees with nothing borrowed from the programs.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import marshal
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = 120               # after which a command hangs
USER, PASSWORD = 'backup@example.org', 'correct horse battery'
KIB, MIB = 1024, 1024 * 1024

# Frames, as far as the tests look into them.
FRAME = struct.Struct('>IBI')
BEGIN, PUT, WITHDRAW, DELETE, CHECKPOINT, COMMIT = 10, 11, 12, 13, 14, 15
GET, CHANGES, BEGUN, RECEIVED, COMMITTED = 8, 6, 141, 142, 143


def seed_choose(what):
    """A seed, printed; SEED in the environment repeats a run."""
    seed = int(os.environ.get('SEED') or random.SystemRandom().getrandbits(32))
    print('SEED=%d for %s' % (seed, what), flush=True)
    return seed


##############################################################################
# Programs
##############################################################################


class Programs:
    """Where the programs are: by their paths, or compiled once for all the
    processes of a module, which saves each of them 0.2 s.
    """

    compiled = None             # TemporaryDirectory, made when first asked

    @classmethod
    def path(cls, name, compiled=True):
        if not compiled:
            return os.path.join(ROOT, name + '.py')
        if cls.compiled is None:
            cls.compiled = tempfile.TemporaryDirectory(prefix='programs-')
            os.chmod(cls.compiled.name, 0o755)
            for program in ('tarsnap', 'tarsnapd', 'keygen', 'cronwatch'):
                # To run, and for those of them that import it.  Compiled by
                # whichever module of tests was the first.
                code = importlib.machinery.SourceFileLoader(
                    program, os.path.join(ROOT, program + '.py')
                ).get_code(program)
                with open(os.path.join(cls.compiled.name, program + '.pyc'),
                          'wb') as file:
                    file.write(importlib.util.MAGIC_NUMBER + bytes(12)
                               + marshal.dumps(code))
        return os.path.join(cls.compiled.name, name + '.pyc')


class Done:
    """What a command came to: exit status `code`, `out` and `err` as text."""

    def __init__(self, code, out, err):
        self.code = code
        self.raw = out
        self.out = out.decode('utf-8', 'surrogateescape')
        self.err = err.decode('utf-8', 'surrogateescape')

    @property
    def lines(self):
        return self.err.splitlines()

    def __repr__(self):
        return 'exit %d\n--- out\n%s\n--- err\n%s' % (
            self.code, self.out[-2000:], self.err[-4000:])

    def numbers(self, row):
        """The two numbers of a row of statistics."""
        found = re.search(r'^%s +(\d+) +(\d+)$' % re.escape(row),
                          self.out + self.err, re.M)
        return int(found[1]), int(found[2])


class Running:
    """A command that is running; its output goes to files."""

    def __init__(self, argv, files, **options):
        self.files = [open(name, 'w+b') for name in files]
        self.process = subprocess.Popen(argv, stdout=self.files[0],
                                        stderr=self.files[1], **options)

    def text(self, number=1):
        """What it has said so far: 0 stdout, 1 stderr."""
        with open(self.files[number].name, 'rb') as file:
            return file.read()

    def send(self, number):
        """A signal, to this process by its id."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def wait(self, seconds=SECONDS):
        """Its Done, once it has ended."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError('hangs: %s\n%s' % (
                self.process.args, self.text().decode('utf-8', 'replace')
            )) from None
        finally:
            for file in self.files:
                file.close()
        return Done(self.process.returncode, self.text(0), self.text(1))

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for file in self.files:
            file.close()


class World:
    """A temporary directory with a store of some kind, keys and hosts.

    `kind`: 'dir' a store directory, 'tls' a server, 'front' a server behind a
    Front.  `case` cleans up at its end; it is a TestCase or a TestCase class.
    Without `compiled` the programs are run as they are.  `init` are options
    for the server directory, `env` is added to the environment; without
    either a server is a copy of one made before, unless it has to be `other`.
    """

    def __init__(self, case, kind='dir', compiled=True, init=(), env=(),
                 other=False):
        self.case = case
        self.compiled = compiled
        self.clean = getattr(case, 'addClassCleanup', case.addCleanup) \
            if isinstance(case, type) else case.addCleanup
        self.root = tempfile.mkdtemp(prefix='world-')
        self.clean(self.remove)
        self.clock = 0              # numbers the files of commands
        self.server = self.front = None
        self.environment = dict(self.environ(), **dict(env))
        for name in ('home', 'logs'):
            os.mkdir(self.path(name))
        self.address = self.path('store')
        if kind == 'dir' and init:
            self.tarsnapd('init', self.address, *init)
        if kind != 'dir':
            self.server = Server(self, front=kind == 'front', init=init,
                                 copy=not (init or env or other))
            self.address = '127.0.0.1:%d' % self.server.port
        if kind == 'front':
            self.front = Front(self)
            self.address = '127.0.0.1:%d' % self.front.port
        self.key = None

    def path(self, *names):
        return os.path.join(self.root, *names)

    def program(self, name):
        return Programs.path(name, self.compiled)

    def remove(self):
        shutil.rmtree(self.root, ignore_errors=True)
        if os.path.exists(self.root):       # directories that are shut
            subprocess.call(['chmod', '-R', 'u+rwx', self.root])
            subprocess.call(['rm', '-rf', '--', self.root])

    def environ(self):
        """A user's environment, without anything that may help."""
        keep = {name: os.environ[name] for name in
                ('PATH', 'TMPDIR', 'VIRTUAL_ENV', 'LD_LIBRARY_PATH')
                if name in os.environ}
        return dict(keep, HOME=self.path('home'), LANG='C.UTF-8', TZ='UTC')

    # Running.

    def spawn(self, argv, env=None, cwd=None, stdin=None, **options):
        """A Running command; ended with the world at the latest."""
        self.clock += 1
        files = [self.path('logs', '%d.%s' % (self.clock, kind))
                 for kind in ('out', 'err')]
        running = Running(argv, files, cwd=cwd or self.root,
                          env=self.environment if env is None else env,
                          stdin=stdin or subprocess.DEVNULL, **options)
        self.clean(running.end)
        return running

    def run(self, argv, give=None, seconds=SECONDS, **options):
        """The Done of a command; `give` (bytes) is its standard input."""
        if give is None:
            return self.spawn(argv, **options).wait(seconds)
        with tempfile.TemporaryFile() as file:
            file.write(give)
            file.seek(0)
            return self.spawn(argv, stdin=file, **options).wait(seconds)

    def argv(self, args, key='', cache='', program=None):
        """The command line of a tarsnap; None for key or cache omits it."""
        argv = [sys.executable, program or self.program('tarsnap'),
                '--no-default-config']
        key = self.key if key == '' else key
        cache = self.path('cache') if cache == '' else cache
        if key:
            argv += ['--keyfile', key]
        if cache:
            os.makedirs(cache, 0o700, exist_ok=True)
            argv += ['--cachedir', cache]
        return argv + list(args)

    def tarsnap(self, *args, key='', cache='', program=None, **options):
        return self.run(self.argv(args, key, cache, program), **options)

    def start(self, *args, key='', cache='', **options):
        """A Running tarsnap."""
        return self.spawn(self.argv(args, key, cache), **options)

    def ok(self, *args, **options):
        """A tarsnap that must succeed; its Done."""
        done = self.tarsnap(*args, **options)
        if done.code:
            raise AssertionError('%s: %r' % (args, done))
        return done

    def tarsnapd_any(self, *args, **options):
        """A server command; its Done, whatever came of it."""
        return self.run([sys.executable, self.program('tarsnapd'), *args],
                        **options)

    def tarsnapd(self, *args, **options):
        done = self.tarsnapd_any(*args, **options)
        if done.code:
            raise AssertionError('%s: %r' % (args, done))
        return done

    def tool(self, *args, **options):
        """keygen.py with a tool's name and its arguments."""
        return self.run([sys.executable, self.program('keygen'), *args],
                        **options)

    # Keys.

    def keygen(self, name='key', *extra, give=PASSWORD, server=None):
        """A new machine; the path of its key file.  The first is default."""
        path = self.path(name)
        words = ['keygen', '--keyfile', path, '--machine', name, '--server',
                 server or self.address]
        if self.server:
            words += ['--user', USER, '--fingerprint', self.server.pin]
        done = self.tool(*words, *extra, give=give.encode() + b'\n')
        if done.code:
            raise AssertionError('keygen: %r' % done)
        self.key = self.key or path
        return path

    def subset(self, name, *flags, key=None):
        """A key file with some roles of another."""
        path = self.path(name)
        done = self.tool('keymgmt', '--outkeyfile', path, *flags,
                         key or self.key)
        if done.code:
            raise AssertionError('keymgmt: %r' % done)
        return path

    # Archives.

    def names(self, **options):
        """The names --list-archives shows."""
        return sorted(self.ok('--list-archives', **options).out.splitlines())

    def extract(self, archive, *args, **options):
        """A new directory with all of an archive, extracted."""
        self.clock += 1
        where = self.path('out%d' % self.clock)
        os.mkdir(where)
        done = self.tarsnap('-x', '-p', '-f', archive, '-C', where, *args,
                            **options)
        if done.code or done.err:
            raise AssertionError('-x %s: %r' % (archive, done))
        return where


class Server:
    """A server directory and the process that serves it."""

    made = None                 # (TemporaryDirectory, pin) to copy

    def __init__(self, world, front=False, init=(), copy=False):
        self.world = world
        self.path = world.path('server')
        self.port = 0
        self.running = None
        if copy:
            self.copy()
        else:
            self.pin = self.make(self.path, init)
        if front:
            with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
                file.write('front-certificate = tls.crt\n')
        self.start()

    def make(self, path, init=()):
        """A server directory with a user, at `path`; its pin."""
        pin = self.world.tarsnapd('init', path, *init).out.strip()
        self.world.tarsnapd('user', path, 'add', USER,
                            give=PASSWORD.encode() + b'\n')
        return pin

    def copy(self):
        """Copy the one of this process, which saves 0.5 s of making it."""
        if Server.made is None:
            base = tempfile.TemporaryDirectory(prefix='server-')
            Server.made = base, self.make(os.path.join(base.name, 'server'))
        base, self.pin = Server.made
        shutil.copytree(os.path.join(base.name, 'server'), self.path,
                        symlinks=True)

    def start(self):
        """Serve, on the port of last time if there was one."""
        self.running = self.world.spawn(
            [sys.executable, self.world.program('tarsnapd'), 'serve',
             self.path, '--listen', '127.0.0.1:%d' % self.port])
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = re.search(rb'listening on 127\.0\.0\.1:(\d+)\n',
                              self.running.text())
            if found:
                self.port = int(found[1])
                return
            if self.running.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError('no server: %r' % self.running.text())

    def kill(self, number=signal.SIGKILL):
        """End the process; its Done."""
        self.running.send(number)
        return self.running.wait()

    def restart(self):
        self.kill()
        self.start()

    def stat(self):
        """The figures of `tarsnapd.py stats`, as a dict."""
        return json.loads(self.world.tarsnapd('stats', self.path,
                                              '--json').out)


##############################################################################
# Front
##############################################################################

PASS, DROP, CUT, TEAR = 'pass', 'drop', 'cut', 'tear'


class Wire:
    """One connection through a Front."""

    def __init__(self):
        self.sent = []              # names of PUTs passed on; None: WITHDRAW
        self.received = 0           # of `sent`, the server said
        self.kinds = []             # of frames passed on, in order


class Front:
    """Ends the TLS before a server; every frame goes through `hook`.

    hook(wire, up, kind, body) is called in the thread of the connection; `up`
    is True for what the client sends.  It returns PASS, DROP (swallow), CUT
    (close both ends instead) or TEAR (send half of it, then close), and may
    take its time.
    """

    def __init__(self, world):
        self.world = world
        self.hook = pass_all
        self.wires = []
        self.kept = set()           # names of PUTs the server has RECEIVED
        self.twice = []             # names put again although they were
        self.threads = []
        self.closed = False
        path = world.server.path
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(os.path.join(path, 'tls.crt'),
                                     os.path.join(path, 'tls.key'))
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.listener.settimeout(0.1)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()
        world.clean(self.close)

    def close(self):
        self.closed = True
        for thread in [self.thread] + self.threads:
            thread.join(10)
        self.listener.close()

    def puts(self):
        """Names of all PUTs passed on, in order."""
        return [name for wire in self.wires for name in wire.sent if name]

    def accept(self):
        while not self.closed:
            try:
                raw = self.listener.accept()[0]
            except socket.timeout:
                continue
            thread = threading.Thread(target=self.serve, args=(raw,),
                                      daemon=True)
            self.threads.append(thread)
            thread.start()

    def serve(self, raw):
        """One connection, until either end closes or the hook cuts it."""
        raw.settimeout(SECONDS)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends = []
        try:
            client = self.context.wrap_socket(raw, server_side=True)
            ends.append(client)
            server = socket.create_connection(
                ('127.0.0.1', self.world.server.port), SECONDS)
            ends.append(server)
            self.relay(client, server)
        except (OSError, ValueError):
            pass
        finally:
            raw.close()
            for end in ends:
                end.close()

    def relay(self, client, server):
        wire = Wire()
        self.wires.append(wire)
        buffers = {client: bytearray(), server: bytearray()}
        while not self.closed:
            ready = [client] if client.pending() else select.select(
                [client, server], [], [], 0.2)[0]
            for source in ready:
                data = source.recv(256 * KIB)
                if not data:
                    return
                buffers[source] += data
                target = server if source is client else client
                if not self.frames_pass(wire, buffers[source], target,
                                        source is client):
                    return

    def frames_pass(self, wire, buffer, target, up):
        """Pass the whole frames of `buffer` on; False to close."""
        pos, passed, go_on = 0, bytearray(), True
        while go_on and len(buffer) - pos >= FRAME.size:
            length, kind, _ = FRAME.unpack_from(buffer, pos)
            end = pos + FRAME.size + length
            if end > len(buffer):
                break
            frame = bytes(buffer[pos:end])
            pos = end
            what = self.hook(wire, up, kind, frame[FRAME.size:])
            if what == PASS:
                passed += frame
                self.note(wire, kind, frame[FRAME.size:])
            elif what == TEAR:
                passed += frame[:len(frame) // 2]
            go_on = what in (PASS, DROP)
        del buffer[:pos]
        if passed:
            target.sendall(passed)
        return go_on

    def note(self, wire, kind, body):
        """Keep account of what the server has."""
        wire.kinds.append(kind)
        if kind == BEGIN:
            wire.sent, wire.received = [], 0
        elif kind == PUT:
            if body[:32] in self.kept:
                self.twice.append(body[:32])
            wire.sent.append(body[:32])
        elif kind == WITHDRAW:
            wire.sent.append(None)
            for at in range(2, len(body), 32):
                self.kept.discard(body[at:at + 32])
        elif kind == RECEIVED:
            count, = struct.unpack('>Q', body)
            self.kept.update(filter(None, wire.sent[wire.received:count]))
            wire.received = count


def pass_all(wire, up, kind, body):
    return PASS


##############################################################################
# Trees
##############################################################################


def write(path, data=b'', mtime=None):
    """A file with bytes `data`; its directories are made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(data)
    if mtime is not None:
        os.utime(path, (mtime, mtime))


def text(size, seed):
    """About `size` bytes of lines that deflate well and differ."""
    dice, lines, length = random.Random(seed), [], 0
    while length < size:
        lines.append(b'%08x the quick brown fox %d jumps over the lazy dog\n'
                     % (dice.getrandbits(32), dice.getrandbits(8)))
        length += len(lines[-1])
    return b''.join(lines)


def noise(size, seed):
    """`size` bytes that do not deflate."""
    return random.Random(seed).randbytes(size)


def tree_small(path, seed, files=40):
    """A tree of small files and a few larger ones, of about 1.5 MB."""
    dice = random.Random(seed)
    for number in range(files):
        write(os.path.join(path, 'd%d' % (number % 4), 'f%d' % number),
              noise(dice.randrange(8000), dice.random()))
    write(os.path.join(path, 'large', 'noise'), noise(MIB, dice.random()))
    write(os.path.join(path, 'large', 'text'), text(300 * KIB, dice.random()))
    os.symlink('f1', os.path.join(path, 'd1', 'link'))


def tree_noise(path, seed, megabytes, size=200 * KIB):
    """`megabytes` of files that are one chunk each."""
    dice = random.Random(seed)
    for number in range(megabytes * MIB // size):
        write(os.path.join(path, '%04d' % number), noise(size, dice.random()))


def tree_pages(path, seed, files=1000):
    """Paths so long that a page of the index is full after some 150 files;
    16 MB, of which a client far ahead of the server has 6 in its queue.
    """
    deep = os.path.join(path, *['deep' * 60] * 3)
    dice = random.Random(seed)
    for number in range(files):
        write(os.path.join(deep, '%02d' % (number // 50), '%d' % number),
              b'%d' % number)
        if number % 25 == 0:
            write(os.path.join(deep, '%02d' % (number // 50), 'noise%d'
                               % number), noise(400000, dice.random()))


ODD_NAMES = [b'new\nline', b'invalid\xff\xfeutf-8', b'x' * 255, b'-dash',
             b' blank ', b'back\\slash', b'star*[glob]?', b'tab\tquote"\'',
             'ümläut€𝄞'.encode(), b'\x01control', b'...', b'#hash', b'~tilde',
             b'\xc3\xbc' * 127, b'nfd-u\xcc\x88']


def tree_full(path, seed, largest=70 * MIB):
    """Everything a file system can hold, but what tree_vast() makes."""
    lib = os.path.dirname(os.__file__)
    for name in ('json', 'email', 'asyncio', 'encodings'):
        shutil.copytree(os.path.join(lib, name),
                        os.path.join(path, 'lib', name), symlinks=True,
                        ignore=shutil.ignore_patterns('__pycache__'))
    names = os.fsencode(os.path.join(path, 'names'))
    for number, name in enumerate(ODD_NAMES):
        write(os.path.join(names, name), b'odd %d' % number)
        os.makedirs(os.path.join(names, b'dirs', name, name))
        os.symlink(name, os.path.join(names, b'dirs', b'link%d' % number))
    os.makedirs(os.path.join(path, 'empty', 'a', 'b'))
    write(os.path.join(path, 'empty', 'zero'))
    tree_sizes(os.path.join(path, 'sizes'), seed, largest)
    dice = random.Random(seed)
    for number in range(3000):
        write(os.path.join(path, 'tiny', '%02d' % (number % 50),
                           '%04d' % number), b'%d' % dice.getrandbits(
                               8 * dice.randrange(1, 200)))
    tree_links(os.path.join(path, 'links'))
    tree_special(os.path.join(path, 'special'))
    tree_times(os.path.join(path, 'times'))


def tree_sizes(path, seed, largest):
    """Files about every length at which they are stored differently."""
    for size in (1, 31, 32, 33, 255, 256, 257, 512, 513):
        for more in (-1, 0, 1):
            write(os.path.join(path, '%dk%+d' % (size, more)),
                  noise(size * KIB + more, seed + size * 3 + more))
    write(os.path.join(path, '5m'), noise(5 * MIB, seed))
    write(os.path.join(path, '20m.text'), text(20 * MIB, seed))
    write(os.path.join(path, 'largest'), noise(largest, seed + 1))
    write(os.path.join(path, 'zeros'), bytes(3 * MIB))


def tree_links(path):
    for name in ('a', 'b', 'b/c', 'dirs'):
        os.mkdir(os.path.join(path, name)) if '/' in name else \
            os.makedirs(os.path.join(path, name))
    write(os.path.join(path, 'a', 'file'), b'linked' * 10000)
    for name in ('b/same', 'b/c/same', 'z'):
        os.link(os.path.join(path, 'a', 'file'), os.path.join(path, name))
    write(os.path.join(path, 'a', 'twin'), b'linked' * 10000)
    os.symlink('nowhere/at all', os.path.join(path, 'dangling'))
    os.symlink('../a/file', os.path.join(path, 'b', 'symlink'))
    os.symlink('/', os.path.join(path, 'slash'))
    os.symlink('t' * 4000, os.path.join(path, 'long'))
    os.link(os.path.join(path, 'dangling'), os.path.join(path, 'b', 'dang2'),
            follow_symlinks=False)
    os.mkfifo(os.path.join(path, 'fifo'))
    os.link(os.path.join(path, 'fifo'), os.path.join(path, 'a', 'fifo2'))


def tree_special(path):
    """Modes, attributes; owners and devices where we are root."""
    shut = 0o400 if os.geteuid() else 0
    for mode in (shut, 0o444, 0o4755, 0o2755, 0o6711, 0o777, 0o1644):
        write(os.path.join(path, 'mode%o' % mode), b'%o' % mode)
        os.chmod(os.path.join(path, 'mode%o' % mode), mode)
    for mode in (0o500, 0o1777, 0o2750, 0o711):
        below = os.path.join(path, 'dir%o' % mode)
        write(os.path.join(below, 'file'), b'in it')
        os.chmod(below, mode)
    os.mkfifo(os.path.join(path, 'fifo'), 0o622)
    write(os.path.join(path, 'attributes'), b'with attributes')
    for name, value in ((b'user.one', b'1'), (b'user.none', b''),
                        (b'user.\xc3\xbc', bytes(range(256))),
                        (b'user.long', b'long' * 400)):
        attribute_set(os.path.join(path, 'attributes'), name, value)
    attribute_set(os.path.join(path, 'dir711'), b'user.dir', b'of a directory')
    acl = os.path.join(path, 'acl')
    write(os.path.join(acl, 'file'), b'with an ACL')
    if shutil.which('setfacl'):
        subprocess.call(['setfacl', '-m', 'u:1:rw,g:2:x',
                         os.path.join(acl, 'file')])
        subprocess.call(['setfacl', '-m', 'd:u:1:rwx,u:3:r', acl])
        write(os.path.join(acl, 'heir'), b'inherited')
    if os.geteuid():
        return
    for uid, gid in ((1, 2), (65534, 65534), (123456, 654321)):
        name = os.path.join(path, 'owner%d' % uid)
        write(name, b'somebody\'s')
        os.chown(name, uid, gid)
        os.symlink('x', name + '.link')
        os.chown(name + '.link', uid, gid, follow_symlinks=False)
    os.chown(os.path.join(path, 'mode4755'), 1, 2)
    os.chmod(os.path.join(path, 'mode4755'), 0o4755)
    try:
        os.mknod(os.path.join(path, 'null'), stat.S_IFCHR | 0o666,
                 os.makedev(1, 3))
        os.mknod(os.path.join(path, 'disk'), stat.S_IFBLK | 0o640,
                 os.makedev(250, 70000))
    except PermissionError:
        pass                        # in a container without the right


def attribute_set(path, name, value):
    """An extended attribute, where the file system has them."""
    try:
        os.setxattr(path, name, value)
    except (OSError, AttributeError):
        pass


def tree_times(path):
    for name, ns in (('old', -123456789987654321), ('epoch', 0),
                     ('minus', -1), ('future', 14 * 10 ** 18 + 1),
                     ('nano', 1234567890123456789)):
        write(os.path.join(path, name), name.encode())
        os.utime(os.path.join(path, name), ns=(ns, ns))
        os.mkdir(os.path.join(path, name + '.d'))
        os.utime(os.path.join(path, name + '.d'), ns=(ns, ns))
        os.symlink(name, os.path.join(path, name + '.l'))
        os.utime(os.path.join(path, name + '.l'), ns=(ns, ns),
                 follow_symlinks=False)


def tree_vast(path, seed):
    """What other tools do not reach: a path of 5 600 bytes, 10 GB of hole."""
    os.makedirs(path)
    with open(os.path.join(path, 'sparse'), 'wb') as file:
        for place in (0, 10 ** 9, 7 * 10 ** 9 + 12345):
            file.seek(place)
            file.write(noise(100000, seed + place))
        file.truncate(10 * 10 ** 9)
    with open(os.path.join(path, 'hole'), 'wb') as file:
        file.truncate(10 ** 6)
    fd = os.open(path, os.O_RDONLY)
    for number in range(28):
        name = b'%03d' % number + b'd' * 197
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    file = os.open(b'bottom', os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd)
    os.write(file, b'down here')
    os.close(file)
    os.symlink(b'bottom', b'link', dir_fd=fd)
    os.close(fd)


def tree_scan(path):
    """{relative name: (type, mode, owner, size, mtime, attributes, names of
    the same file, target, device, content)} of everything below `path`.
    """
    found, groups = {}, {}
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        scan_directory(top, b'', found, groups)
    finally:
        os.close(top)
    for names in groups.values():
        for name in names:
            found[name]['names'] = tuple(sorted(names))
    return found


def scan_directory(fd, prefix, found, groups):
    for name in sorted(os.listdir(b'/proc/self/fd/%d' % fd)
                       if sys.platform == 'linux' else
                       map(os.fsencode, os.listdir(fd))):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        member = prefix + name
        found[member] = scan_entry(fd, name, st)
        if stat.S_ISDIR(st.st_mode):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            try:
                scan_directory(below, member + b'/', found, groups)
            finally:
                os.close(below)
        elif st.st_nlink > 1:
            groups.setdefault((st.st_dev, st.st_ino), []).append(member)


def scan_entry(fd, name, st):
    kind = stat.S_IFMT(st.st_mode)
    entry = {'type': kind, 'mode': stat.S_IMODE(st.st_mode),
             'owner': (st.st_uid, st.st_gid), 'mtime': st.st_mtime_ns,
             'attributes': scan_attributes(fd, name)}
    if kind == stat.S_IFREG:
        entry['size'] = st.st_size
        entry['content'] = scan_content(fd, name, st.st_size)
    elif kind == stat.S_IFLNK:
        entry['target'] = os.readlink(name, dir_fd=fd)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry['device'] = st.st_rdev
    return entry


def scan_attributes(fd, name):
    where = b'/proc/self/fd/%d/%b' % (fd, name)
    try:
        return {key: os.getxattr(where, key, follow_symlinks=False)
                for key in os.listxattr(where, follow_symlinks=False)}
    except (OSError, AttributeError):
        return {}


def scan_content(fd, name, size):
    """Digest of a file's blocks that are not zeros, with their places."""
    try:
        file = os.open(name, os.O_RDONLY, dir_fd=fd)
    except PermissionError:
        return 'unreadable'
    digest, pos = hashlib.sha256(), 0
    try:
        while pos < size:
            try:
                pos = os.lseek(file, pos, os.SEEK_DATA) // 65536 * 65536
            except OSError:             # nothing but a hole is left
                break
            data = os.pread(file, 65536, pos)
            if data.count(0) != len(data):
                digest.update(b'%d:' % pos + data)
            pos += len(data)
    finally:
        os.close(file)
    return digest.hexdigest()


def tree_differences(left, right):
    """Lines on how two scans differ."""
    lines = []
    for name in sorted(set(left) | set(right)):
        a, b = left.get(name), right.get(name)
        if a is None or b is None:
            lines.append('%r: only in the %s' % (
                name[-100:], 'first' if b is None else 'second'))
        elif a != b:
            lines.append('%r: %s' % (name[-100:], ', '.join(
                '%s %r, %r' % (field, a.get(field), b.get(field))
                for field in sorted(set(a) | set(b))
                if a.get(field) != b.get(field))))
    return lines


def tree_equal(case, left, right):
    """Fail unless trees (paths or scans) are equal, saying how they differ."""
    left, right = (tree_scan(tree) if isinstance(tree, str) else tree
                   for tree in (left, right))
    lines = tree_differences(left, right)
    if lines or not left:
        case.fail('%d differences:\n%s' % (len(lines), '\n'.join(lines[:12])))
