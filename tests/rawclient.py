# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A small client of the wire protocol, independent of the programs it tests.

Frames, TLS, AUTH, REGISTER and commit objects are built here by hand from
tarsnap-protocol(7); blocks are sealed by nobody, only shaped like it.  It
speaks to a real `serve` process over TLS (`Wire`), to `session --stdio`
(`Stdio`), or to an embedded session (`Embedded`), which all have send() and
next(), and `Client` is the same for all of them.
"""

import contextlib
import hashlib
import hmac
import io
import os
import queue
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), 'tarsnapd.py')
sys.path.insert(0, os.path.dirname(HERE))

import tarsnapd  # noqa: E402  (for embedded sessions only)
import world     # noqa: E402

R, W, D, N = 1, 2, 3, 4
WRITE, DELETE_KIND, NUKE_KIND, ABORT_KIND = 1, 2, 3, 4
OPEN, PARTIAL, COMPLETE = 1, 2, 3
ZERO = bytes(32)
NONE = hashlib.sha256(b'').digest()

REQUEST = {
    'HELLO': 1, 'REGISTER1': 2, 'REGISTER2': 3, 'AUTH': 4, 'STAT': 5,
    'CHANGES': 6, 'LIST': 7, 'GET': 8, 'HAS': 9, 'BEGIN': 10, 'PUT': 11,
    'WITHDRAW': 12, 'DELETE': 13, 'CHECKPOINT': 14, 'COMMIT': 15,
    'ABORT': 16, 'NUKE': 17, 'REVIVE': 18, 'ACCOUNT': 19}
ANSWER = {
    128: 'STATEMENT', 129: 'OK', 130: 'ERROR', 131: 'CHALLENGE',
    132: 'REGISTERED', 133: 'AUTHOK', 134: 'STATUS', 135: 'COMMIT_OBJECT',
    136: 'ADDED', 137: 'REMOVED', 138: 'ARCHIVES', 139: 'BLOCK',
    140: 'BITMAP', 141: 'BEGUN', 142: 'RECEIVED', 143: 'COMMITTED',
    144: 'BUSY', 145: 'FIGURES'}
CODE = {
    1: 'BAD', 2: 'ROLE', 3: 'CONFLICT', 4: 'EXISTS', 5: 'NOBLOCK',
    6: 'FUNDS', 7: 'QUOTA', 8: 'READONLY', 9: 'BUSY', 10: 'EXPIRED',
    11: 'RESYNC', 12: 'LOGIN', 13: 'NOMACHINE', 14: 'MISMATCH',
    15: 'NOARCHIVE', 16: 'INTERNAL'}
UNANSWERED = ('PUT', 'WITHDRAW', 'DELETE')


def sha(data):
    return hashlib.sha256(data).digest()


def u16(n):
    return struct.pack('>H', n)


def u64(n):
    return struct.pack('>Q', n)


class Error(Exception):
    """The server answered with a typed error."""

    def __init__(self, body):
        self.code = CODE[struct.unpack('>H', body[:2])[0]]
        super().__init__('%s: %s' % (self.code, body[2:].decode()))


class Closed(Exception):
    """The server hung up."""


class Wire:
    """Frames over TLS to HOST:PORT."""

    transport = 1

    def __init__(self, port):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        raw = socket.create_connection(('127.0.0.1', port), 20)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = context.wrap_socket(raw)
        except (OSError, ssl.SSLError) as e:
            raw.close()
            raise Closed(str(e)) from None
        self.cert_hash = sha(self.sock.getpeercert(True))
        self.buf = b''

    def send(self, data):
        try:
            self.sock.sendall(data)
        except OSError as e:
            raise Closed(str(e)) from None

    def read(self, length):
        while len(self.buf) < length:
            try:
                data = self.sock.recv(1 << 20)
            except OSError as e:
                raise Closed(str(e)) from None
            if not data:
                raise Closed('end of file')
            self.buf += data
        out, self.buf = self.buf[:length], self.buf[length:]
        return out

    def next(self):
        length, kind, rid = struct.unpack('>IBI', self.read(9))
        return kind, rid, self.read(length)

    def close(self):
        self.sock.close()


class Stdio(Wire):
    """Frames over the pipes of `session --stdio`."""

    transport = 2

    def __init__(self, path, *options):
        self.child = subprocess.Popen(
            [sys.executable, program(), 'session', '--stdio', path]
            + list(options), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.cert_hash = ZERO
        self.buf = b''

    def send(self, data):
        try:
            self.child.stdin.write(data)
            self.child.stdin.flush()
        except OSError as e:
            raise Closed(str(e)) from None

    def read(self, length):
        data = self.child.stdout.read(length)
        if len(data) < length:
            raise Closed('end of file')
        return data

    def close(self):
        try:
            self.child.stdin.close()
        except OSError:
            pass
        self.child.stdout.close()
        return self.child.wait(30)


class Embedded:
    """An embedded session."""

    transport = 3

    def __init__(self, path, create=False, module=tarsnapd, **limits):
        self.local = module.open_local(path, create=create, **limits)
        self.transport = {'stdio': 2}.get(limits.get('transport'), 3)
        self.cert_hash = ZERO
        self.frames = queue.deque([(128, 0, self.local.statement)])

    def send(self, data):
        length, kind, rid = struct.unpack('>IBI', data[:9])
        assert len(data) == 9 + length
        self.frames.extend(self.local.receive(kind, rid, data[9:]))

    def next(self):
        if not self.frames:
            self.frames.extend(self.local.idle())
        if not self.frames:
            raise Closed('nothing to answer')
        return self.frames.popleft()

    def close(self):
        self.local.close()


class Keys:
    """Four Ed25519 pairs."""

    def __init__(self):
        self.private = {role: ed25519.Ed25519PrivateKey.generate()
                        for role in (R, W, D, N)}
        self.public = b''.join(
            self.private[role].public_key().public_bytes(
                serialization.Encoding.Raw, serialization.PublicFormat.Raw)
            for role in (R, W, D, N))


class Client:
    """Requests and answers over a link."""

    def __init__(self, link):
        self.link = link
        self.rid = 0
        self.received = 0
        kind, rid, self.statement = link.next()
        assert (kind, rid) == (128, 0), (kind, rid)
        (self.version, self.identity, self.store, self.serial, self.nonce,
         signature) = struct.unpack('>H32s16sQ32s64s', self.statement)
        ed25519.Ed25519PublicKey.from_public_bytes(self.identity).verify(
            signature, b'tarsnap-server-1\0' + self.store + u64(self.serial)
            + link.cert_hash)

    def send(self, name, body=b''):
        """Send a request; its id."""
        self.rid += 1
        kind = REQUEST[name] if isinstance(name, str) else name
        self.link.send(struct.pack('>IBI', len(body), kind, self.rid) + body)
        return self.rid

    def next(self, errors=False):
        """The next answer as (name, body); RECEIVED is noted and passed."""
        while True:
            kind, rid, body = self.link.next()
            name = ANSWER[kind]
            if name == 'RECEIVED':
                assert rid == 0
                self.received = struct.unpack('>Q', body)[0]
            elif name == 'ERROR' and not errors:
                raise Error(body)
            elif name != 'BUSY':
                return name, body

    def call(self, name, body=b''):
        """The one answer to a request."""
        self.send(name, body)
        return self.next()

    def stream(self, name, body=b''):
        """All answers up to OK."""
        self.send(name, body)
        out = []
        while True:
            answer = self.next()
            if answer[0] == 'OK':
                return out
            out.append(answer)

    def wait_received(self, count):
        """Read until the server has said RECEIVED(count)."""
        while self.received < count:
            kind, _, body = self.link.next()
            if ANSWER[kind] == 'ERROR':
                raise Error(body)
            assert ANSWER[kind] == 'RECEIVED', kind
            self.received = struct.unpack('>Q', body)[0]

    def register(self, keys, user='', password=b'', name='host',
                 spoil=False):
        """The number of the new machine."""
        user = user.encode()
        first = os.urandom(32) + bytes([len(user)]) + user
        kind, body = self.call('REGISTER1', first)
        assert kind == 'CHALLENGE'
        salt, log_n, r, p = struct.unpack('>32sBII', body)
        assert 14 <= log_n <= 18 and (r, p) == (8, 1)
        second = bytes([len(name)]) + name.encode() + keys.public
        proof = ZERO
        if user:
            key = hashlib.scrypt(password, salt=salt, n=1 << log_n, r=r, p=p,
                                 maxmem=1 << 28, dklen=32)
            client = hmac.digest(key, b'client', 'sha256')
            mask = hmac.digest(sha(client), self.statement + first + second,
                               'sha256')
            proof = bytes(a ^ b for a, b in zip(client, mask))
        if spoil:
            proof = bytes([proof[0] ^ 1]) + proof[1:]
        kind, body = self.call('REGISTER2', second + proof)
        assert kind == 'REGISTERED'
        number, store = struct.unpack('>Q16s', body)
        assert store == self.store and number
        return number

    def auth_body(self, machine, keys, role, signer=None):
        nonce = os.urandom(32)
        signed = (b'tarsnap-auth-1\0' + u16(1)
                  + bytes([self.link.transport]) + self.store
                  + self.link.cert_hash + u64(machine) + bytes([role])
                  + self.nonce + nonce)
        return (struct.pack('>HQB', 1, machine, role) + nonce
                + keys.private[signer or role].sign(signed))

    def auth(self, machine, keys, *roles):
        """Prove roles; (n, H_n, archives, flags)."""
        for role in roles:
            kind, body = self.call('AUTH',
                                   self.auth_body(machine, keys, role))
            assert kind == 'AUTHOK', kind
        return struct.unpack('>Q32sQB', body)

    def close(self):
        return self.link.close()


class Host:
    """A machine and what its client would remember; builds commits."""

    def __init__(self, client, keys=None, user='', password=b''):
        self.keys = keys or Keys()
        self.machine = client.register(self.keys, user, password)
        self.store = client.store
        self.n = 0
        self.head = sha(b'tarsnap-genesis-1' + u64(self.machine)
                        + self.store + self.keys.public)
        self.archives = {}          # id -> (record, lineage, state)

    def copy(self):
        """Another client of the same machine."""
        other = object.__new__(Host)
        other.__dict__.update(self.__dict__)
        other.archives = dict(self.archives)
        return other

    def begin(self, client, tid, kind=WRITE, lineage=bytes(16), ids=(),
              n=None, head=None):
        """(puts held, digest, [(name, class, length)] of them)."""
        body = (bytes([kind]) + tid + lineage
                + u64(self.n if n is None else n) + (head or self.head)
                + bytes([len(ids)]) + b''.join(ids))
        answers = client.stream('BEGIN', body)
        assert answers[0][0] == 'BEGUN'
        client.received = 0
        _, _, count, digest = struct.unpack('>Q32sQ32s', answers[0][1])
        return count, digest, added(answers[1:])

    def build(self, tid, kind=WRITE, linked=(), unlinked=(), puts=(),
              deletes=(), n=None, previous=None, live=None, note=b'',
              sign=None):
        """A signed commit object on top of what is remembered."""
        archives = dict(self.archives)
        for archive, _ in unlinked:
            archives.pop(archive, None)
        for archive, record, lineage, state in linked:
            archives[archive] = (record, lineage, state)
        deletes = sorted(deletes)
        counts = [u64(len(puts)), sha(b''.join(puts)),
                  u64(len(deletes)), sha(b''.join(deletes))]
        if kind == NUKE_KIND:
            archives = {}
            counts[2:] = [b'\xff' * 8, ZERO]
        if live is None:
            live = sha(b''.join(a + x[0] + bytes([x[2]])
                                for a, x in sorted(archives.items())))
        body = b''.join(
            [b'tarsnap-commit-1', u64(self.machine),
             u64(self.n + 1 if n is None else n), previous or self.head,
             bytes([kind]), tid, u16(len(linked))]
            + [a + r + g + bytes([s]) for a, r, g, s in linked]
            + [u16(len(unlinked))] + [a + r for a, r in unlinked]
            + counts + [live, u16(len(note)), note])
        role = sign or {1: W, 2: D, 3: N, 4: W}[kind]
        return body + self.keys.private[role].sign(
            b'tarsnap-history-1\0' + body)

    def remember(self, commit, linked=(), unlinked=(), kind=WRITE):
        """A commit of ours was accepted."""
        self.n += 1
        self.head = sha(commit)
        if kind == NUKE_KIND:
            self.archives = {}
        for archive, _ in unlinked:
            del self.archives[archive]
        for archive, record, lineage, state in linked:
            self.archives[archive] = (record, lineage, state)

    def commit(self, client, tid, frame='COMMIT', **what):
        """Commit, check the answer, remember; the commit object."""
        commit = self.build(tid, **what)
        kind, body = client.call(frame, commit)
        assert kind == 'COMMITTED', kind
        n, head, _ = struct.unpack('>Q32sQ', body)
        assert (n, head) == (self.n + 1, sha(commit))
        self.remember(commit, what.get('linked', ()),
                      what.get('unlinked', ()), what.get('kind', WRITE))
        return commit

    def backup(self, client, label, blocks=3, size=1000):
        """A whole write of an archive; (archive id, record, names)."""
        tid = os.urandom(16)
        self.begin(client, tid)
        names = []
        for i in range(blocks):
            names.append(put(client, block('c', '%s-%d' % (label, i), size)))
        record = put(client, block('a', label))
        archive = sha(b'id' + label.encode())
        self.commit(client, tid, puts=names + [record],
                    linked=[(archive, record, bytes(16), COMPLETE)])
        return archive, record, names


def part(recipient, data):
    return struct.pack('>BI', recipient, len(data)) + data


def block(cls, label, size=100):
    """(name, class, sealed block): deterministic in its arguments."""
    seed = ('%s %s' % (cls, label)).encode()
    stuff = hashlib.shake_128(seed).digest(max(size, 28))
    recipients = {'c': (1,), 'i': (2, 1), 'a': (2, 2, 1)}[cls]
    body = b'\x01' + cls.encode() + bytes([len(recipients)]) + sha(b'epk')
    body += b''.join(part(r, stuff) for r in recipients)
    return sha(seed), cls.encode(), body


def refs_view(sealed):
    """The prefix of a block that the delete role may see."""
    pos = end = 35
    for _ in range(sealed[2]):
        recipient, length = struct.unpack_from('>BI', sealed, pos)
        pos += 5 + length
        if recipient == 2:
            end = pos
    return sealed[:end]


def put(client, one):
    """Send a PUT; the name."""
    client.send('PUT', one[0] + one[1] + one[2])
    return one[0]


def names_body(names):
    return u16(len(names)) + b''.join(names)


def added(answers):
    """The rows of ADDED frames."""
    rows = []
    for kind, body in answers:
        if kind == 'ADDED':
            rows += struct.iter_unpack('>32scI', body[2:])
    return rows


def get(client, names, mask=3):
    """For each name the block, or the code of the error in its place."""
    client.send('GET', bytes([mask]) + names_body(names))
    out = []
    while True:
        kind, body = client.next(errors=True)
        if kind == 'OK':
            return out
        if kind == 'ERROR':
            out.append(Error(body).code)
        else:
            assert kind == 'BLOCK' and body[:32] == names[len(out)]
            out.append(body[32:])


def program():
    """PROGRAM, compiled once: most commands take longer to compile than to
    run.
    """
    return world.Programs.path('tarsnapd')


class Serve:
    """A real `serve` process on a free port of the loopback."""

    def __init__(self, path, *options):
        self.path = path
        self.child = subprocess.Popen(
            [sys.executable, program(), 'serve', path, '--listen',
             '127.0.0.1:0', '--journal-level', 'trouble'] + list(options),
            stderr=subprocess.PIPE)
        line = self.child.stderr.readline().decode()
        assert 'listening on 127.0.0.1:' in line, line
        self.port = int(line.rpartition(':')[2])

    def client(self):
        return Client(Wire(self.port))

    def alive(self):
        return self.child.poll() is None

    def kill(self):
        self.child.kill()
        self.child.wait()
        self.child.stderr.close()

    def stop(self):
        """SIGTERM; the exit status and what it said."""
        self.child.send_signal(signal.SIGTERM)
        said = self.child.stderr.read().decode()
        self.child.stderr.close()
        return self.child.wait(60), said


def here(*args):
    """Run a command in this process; (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = tarsnapd.main(list(args))
    return status, out.getvalue(), err.getvalue()


def run(*args, stdin=b''):
    """Run a command; (status, stdout, stderr)."""
    done = subprocess.run([sys.executable, program()] + list(args),
                          input=stdin, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def server_directory(case, options=()):
    """A fresh server directory with user joe, password pw, for a test;
    `options` as of tarsnapd.server_create().
    """
    base = tempfile.TemporaryDirectory()
    (case.addClassCleanup if isinstance(case, type)
     else case.addCleanup)(base.cleanup)
    path = os.path.join(base.name, 'srv')
    tarsnapd.server_create(path, options)
    tarsnapd.certificate_renew(path)
    server = tarsnapd.Server(path)
    server.run(tarsnapd.account_create('joe', b'pw'))
    server.close()
    return path
