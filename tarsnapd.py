#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnapd: the server; it keeps sealed blocks and a signed history of them.

It can read nothing of what it keeps.  Blocks arrive sealed and named; what the
server sees is sizes, names that are keyed hashes, and which commit put or
deleted which of them.  One file; Python >= 3.9 and the `cryptography` package.

The way of a backup:

    frame PUT -> checked for shape -> batch of 256 KiB -> spool file (RECEIVED)
              -> at 32 MiB or a commit: entry table, fsync, a segment object
    frame COMMIT -> signature, base and lists against the index
                 -> all segments durable -> log entry k+1 by put-if-absent
                 -> the index catches up with the log -> COMMITTED

The log is the truth: entry k is written once, only if absent, and never
changes.  The index (SQLite) is a function of the log and may be thrown away
at any time; a live index is made by the same code that rebuilds it.

Nothing in the protocol does I/O.  Its handlers are generators that yield what
they want (`data = yield ('get', key, offset, length)`) and are sent what came
of it, or have the error thrown in.  A driver carries the wishes out: at once
(a directory opened by the client, a pipe), in a pool of threads (the event
loop), or in whatever order a test finds cruel.  The wishes are

    ('get', key, offset, length)  ('put', key, data)      the store
    ('list', prefix)  ('size', key)  ('made', key)  ('delete', key)
    ('mend', key, data)                                   of repair alone
    ('spool', method, ...)                                open segments
    ('index', machine, method, ...)                       the index
    ('view', method, ...)                                 of the ledger
    ('sent', machine, bytes)      went to a client
    ('all', wishes)               several: values, StoreErrors in their place
    ('room',)                     how many bytes of blocks to read at once
    ('now',)  ('random', n)  ('wait', seconds)            clock and chance
    ('guess', method, ...)        who may try how many passwords yet
    ('provider', name, method, path, body, key)     of payments
    ('answer', type, body[, request id])                  a frame to the client

Map of this file, bottom up; no section uses a name from a later one:

    constants, errors     numbers, and what can go wrong by its remedy
    wire                  frames, blocks, commit objects; as the client has it
    store                 five verbs over flat files
    S3                    the same five over the objects of a bucket: signing,
                          credentials, requests, store
    steps                 how generators of wishes are carried out
    segments, spool       many blocks to an object; the open one is a file
    log                   entry k, which decides
    index                 SQLite, caught up from the log
    history               the rules a commit must pass
    accounts, machines    who may register, and who did
    mail, links           what is to be mailed; what its reader may do
    ledger                what was used and paid, and what is left
    reports               what a month was
    site                  what the account pages know of the server
    payments              how what was paid gets into the ledger
    export                what is held about a person
    session               one connection's requests, without I/O
    cleaner               gives back the space of deleted blocks
    scrub                 everything stored against its hashes
    repair                what can be known again is put back
    payments: requests    the APIs of payment providers
    server directory      keys, configuration, and what carries wishes out
    mail, sending         to a mail server, until that has it
    scrub, kept           how far it came, for a command and for serve
    journal               a line for each event, while it serves
    drivers               at once: embedded and on a pipe
    event loop            many connections over TLS
    canary                a small client, which sees whether a server works
    check                 what a monitor is told
    commands, main        the command line

Formats and protocol are written down byte by byte in tarsnap-format(5) and
tarsnap-protocol(7); commands in tarsnapd(8).
"""

import base64
import collections
import contextlib
import errno
import fcntl
import hashlib
import heapq
import hmac
import itertools
import json
import os
import queue
import select
import struct
import sys
import threading
import time
import zlib

VERSION = '1.1.0'

KIB = 1024
MIB = 1024 * KIB

# What the server alone limits.  Bytes, unless the name says otherwise.
LIMIT = {
    'segment': 32 * MIB,            # an open segment is closed at this size
    'segment entries': 65536,       # or with so many entries
    'batch': 256 * KIB,             # puts written together
    'batch in memory': 512 * KIB,   # above it no more is taken
    'unparsed': 512 * KIB,          # above it, and a frame is whole, no more
    #                                 is read of a connection
    'read at once': MIB,            # then it is another connection's turn,
    'seconds at once': 0.05,        # or after so long
    'records': 16 * KIB,            # of TLS, taken together
    'full records': 128 * KIB,      # of who fills them, or of ours
    'records for nothing': 17 * KIB,    # with no byte for us in them: a record
    #                                 is not longer; then it is a flood
    'received unauthenticated': MIB,    # of one connection, as it came
    'rows at once': 100000,         # of segments, that the index applies
    'rows with room': 20000,        # for so many it takes more memory
    'read': 4 * MIB,                # one range read for GET,
    'read in a crowd': 256 * KIB,   # and where many hold much
    'entry': MIB + 4 * KIB,         # of a segment, with its header
    'read gap': 64 * KIB,           # read over rather than read twice
    'out': MIB,                     # waiting to be sent; nothing more is made
    'out in a crowd': 64 * KIB,
    'all connections': 48 * MIB,    # requests, batches and answers together
    'transactions': 4,              # open, of one machine
    'unauthenticated': 64,          # connections
    'unauthenticated per address': 8,
    'seconds to authenticate': 10,
    'seconds to drain': 60,         # a peer that reads nothing is let go
    'seconds to drain in a crowd': 2,
    'seconds to finish': 30,        # after SIGTERM
    'logins': 3,                    # wrong passwords on one connection
    'challenges': 16,               # asked for on one
    'requests unauthenticated': 64,     # of one
    'frames at once': 256,          # then it is another connection's turn
    'seconds to freeze': 5,         # until a session hears of it
    'seconds paid': 60,             # until a session asks for money again
    'seconds measured': 60,         # until it looks what others have put
    'seconds in debt': 86400,       # for what has begun, to be finished
    'names withdrawn': 1 << 20,     # that were never put
    'rows told': 100000,            # in one answer; of a machine's longer ones
    'long answers': 4,              # no more are made at once
}

PORT = 9279

##############################################################################
# Errors
#
# Classed by what the reader can do.  Refused goes to the client as a typed
# ERROR; ServerError is for whoever typed the command; StoreError is the disk.
##############################################################################


class ServerError(Exception):
    """The command, a file or the environment is wrong; str() is one line."""


class StoreError(Exception):
    """An operation on a stored object failed, with an unclear outcome."""

    def __init__(self, operation, key, reason):
        super().__init__('%s %s: %s' % (operation, key, reason))
        self.reason = str(reason)


class NoObject(StoreError):
    """There is no object of that key."""

    def __init__(self, operation, key):
        super().__init__(operation, key, 'no such object')


class Forbidden(StoreError):
    """Our keys may not do that."""


class Damaged(StoreError):
    """What is stored is not what was written; never retried."""


class Unreadable(StoreError):
    """The disk cannot read it, perhaps only now."""


class ProviderError(Exception):
    """A payment provider did not do what it was asked for; `status` is the
    one of HTTP, 0 if there was no answer, and `again` True if the same request
    may succeed later.
    """

    def __init__(self, text, status=0, again=False):
        super().__init__(text)
        self.status = status
        self.again = again


class Refused(Exception):
    """A request cannot be served; `code` is one of E_*."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


##############################################################################
# Wire
#
# Frames, their types, error codes and ceilings, blocks as far as a server can
# look into them, and commit objects: tarsnap-protocol(7).  The client has its
# own copy of these numbers; a test holds the two equal.
##############################################################################

PROTOCOL = 1

# Client to server.
HELLO = 1
REGISTER1 = 2
REGISTER2 = 3
AUTH = 4
STAT = 5
CHANGES = 6
LIST = 7
GET = 8
HAS = 9
BEGIN = 10
PUT = 11
WITHDRAW = 12
DELETE = 13
CHECKPOINT = 14
COMMIT = 15
ABORT = 16
NUKE = 17
REVIVE = 18
ACCOUNT = 19

# Server to client.
STATEMENT = 128
OK = 129
ERROR = 130
CHALLENGE = 131
REGISTERED = 132
AUTHOK = 133
STATUS = 134
COMMIT_OBJECT = 135
ADDED = 136
REMOVED = 137
ARCHIVES = 138
BLOCK = 139
BITMAP = 140
BEGUN = 141
RECEIVED = 142
COMMITTED = 143
BUSY = 144
FIGURES = 145

E_BAD = 1
E_ROLE = 2
E_CONFLICT = 3
E_EXISTS = 4
E_NOBLOCK = 5
E_FUNDS = 6
E_QUOTA = 7
E_READONLY = 8
E_BUSY = 9
E_EXPIRED = 10
E_RESYNC = 11
E_LOGIN = 12
E_NOMACHINE = 13
E_MISMATCH = 14
E_NOARCHIVE = 15
E_INTERNAL = 16

ROLE_READ, ROLE_WRITE, ROLE_DELETE, ROLE_NUKE = 1, 2, 3, 4
ROLE_LETTER = {ROLE_READ: 'r', ROLE_WRITE: 'w', ROLE_DELETE: 'd',
               ROLE_NUKE: 'n'}

KIND_WRITE, KIND_DELETE, KIND_NUKE, KIND_ABORT, KIND_UNDELETE = 1, 2, 3, 4, 5
KIND_ROLE = {1: ROLE_WRITE, 2: ROLE_DELETE, 3: ROLE_NUKE, 4: ROLE_WRITE,
             5: ROLE_DELETE}

OPEN, PARTIAL, COMPLETE = 1, 2, 3

TRANSPORT_TLS, TRANSPORT_STDIO, TRANSPORT_DIR = 1, 2, 3

# Bytes, unless the name says otherwise.
CEILING = {
    'frame before auth': 4 * KIB,
    'frame': MIB + 4 * KIB,
    'chunk': 256 * KIB,             # plain
    'part': 256 * KIB,              # plain rows, refs, names, meta
    'stored chunk': 288 * KIB,
    'stored index': MIB,
    'names': 4096,                  # in one frame
    'note': 256,
    'requests in flight': 256,
    'bytes in flight': 16 * MIB,
}

FRAME = struct.Struct('>IBI')           # length of body, type, request id

U16 = struct.Struct('>H')
U32 = struct.Struct('>I')
U64 = struct.Struct('>Q')

ZERO32 = bytes(32)
DIGEST_OF_NONE = hashlib.sha256(b'').digest()
ALL_DELETED = 0xffffffffffffffff


def sha256(data):
    return hashlib.sha256(data).digest()


class Reader:
    """Takes a request's body apart; every shortfall is Refused as BAD."""

    __slots__ = ('buf', 'pos')

    def __init__(self, buf):
        self.buf = buf
        self.pos = 0

    def take(self, length):
        """The next `length` bytes."""
        end = self.pos + length
        if end > len(self.buf):
            raise Refused(E_BAD, 'request cut short at byte %d of %d'
                          % (self.pos, len(self.buf)))
        out = self.buf[self.pos:end]
        self.pos = end
        return out

    def u8(self):
        return self.take(1)[0]

    def u16(self):
        return U16.unpack(self.take(2))[0]

    def u32(self):
        return U32.unpack(self.take(4))[0]

    def u64(self):
        return U64.unpack(self.take(8))[0]

    def names(self):
        """A count and as many names, not above the ceiling."""
        count = self.u16()
        if count > CEILING['names']:
            raise Refused(E_BAD, '%d names in one frame' % count)
        return split_names(self.take(32 * count))

    def end(self):
        """Nothing may follow."""
        if self.pos != len(self.buf):
            raise Refused(E_BAD, 'request is %d bytes too long'
                          % (len(self.buf) - self.pos))


def split_names(data):
    """The 32-byte names that stand one after the other in `data`."""
    return [data[i:i + 32] for i in range(0, len(data), 32)]


class Frames:
    """Cuts a stream of bytes into frames.

    `ceiling` is the longest body allowed; a longer one is Refused when its
    header has arrived, before anything is allocated for it.
    """

    __slots__ = ('buf', 'ceiling')

    def __init__(self):
        self.buf = bytearray()
        self.ceiling = CEILING['frame before auth']

    def peek(self):
        """The type of the next frame if it is here whole, or None."""
        if len(self.buf) < FRAME.size:
            return None
        length, kind, _ = FRAME.unpack_from(self.buf)
        if length > self.ceiling:
            raise Refused(E_BAD, 'frame of %d bytes, at most %d are allowed'
                          % (length, self.ceiling))
        return kind if len(self.buf) >= FRAME.size + length else None

    def wanted(self):
        """Bytes that the frame at the front takes, as far as is known."""
        if len(self.buf) < FRAME.size:
            return FRAME.size
        return FRAME.size + min(self.ceiling, FRAME.unpack_from(self.buf)[0])

    def next(self):
        """The next whole frame as (type, request id, body), or None."""
        if self.peek() is None:
            return None
        buf = self.buf
        length, kind, rid = FRAME.unpack_from(buf)
        end = FRAME.size + length
        body = bytes(memoryview(buf)[FRAME.size:end])
        del buf[:end]       # bytearray moves its start, not its bytes
        return kind, rid, body


ADDED_ROW = struct.Struct('>32scI')     # name, class, stored length

CHUNK, INDEX, RECORD = b'c', b'i', b'a'
DELETED_LIST, WITHDRAWN_LIST, REVIVED_LIST = b'd', b'w', b'r'
BLOCK_CLASSES = (CHUNK, INDEX, RECORD)
BLOCK_BYTES = set(b''.join(BLOCK_CLASSES))

# Recipients of a block's parts (1 data, 2 refs), in order, by class.
RECIPIENTS = {CHUNK: (1,), INDEX: (2, 1), RECORD: (2, 2, 1)}
TO_REFS = 2
BLOCK_CEILING = {CHUNK: CEILING['stored chunk'],
                 INDEX: CEILING['stored index'],
                 RECORD: CEILING['stored index']}
BLOCK_HEAD = struct.Struct('>BcB32s')       # suite, class, parts, epk
PART_HEAD = struct.Struct('>BI')            # recipient, length
PART_LEAST = 28                             # nonce and tag


def block_check(cls, block):
    """Refused unless sealed `block` has the shape of its class.

    Returns the length of its refs view: the header and all leading parts
    whose recipient is refs.
    """
    recipients = RECIPIENTS.get(cls)
    if recipients is None or len(block) > BLOCK_CEILING[cls]:
        raise Refused(E_BAD, 'block of unknown class or over its ceiling')
    if len(block) < BLOCK_HEAD.size or block[0] != 1 or (
            block[1:2] != cls or block[2] != len(recipients)):
        raise Refused(E_BAD, 'block header does not fit its class')
    pos = view = BLOCK_HEAD.size
    for recipient in recipients:
        if pos + PART_HEAD.size > len(block):
            raise Refused(E_BAD, 'block cut short')
        found, length = PART_HEAD.unpack_from(block, pos)
        if found != recipient or length < PART_LEAST:
            raise Refused(E_BAD, 'block part has a wrong header')
        pos += PART_HEAD.size + length
        if recipient == TO_REFS:
            view = pos
    if pos != len(block):
        raise Refused(E_BAD, 'block lengths do not add up')
    return view


COMMIT_MAGIC = b'tarsnap-commit-1'
COMMIT_HEAD = struct.Struct('>16sQQ32sB16s')


class Commit:
    """A commit object taken apart.  Made by commit_decode only."""

    __slots__ = ('machine', 'n', 'previous', 'kind', 'tid', 'linked',
                 'unlinked', 'puts', 'deletes', 'live', 'signed', 'signature',
                 'hash')


def commit_decode(data):
    """The Commit in `data`; Refused as BAD unless well formed.

    Says nothing yet of its truth: see history_check.
    """
    reader = Reader(data)
    commit = Commit()
    (magic, commit.machine, commit.n, commit.previous, commit.kind,
     commit.tid) = COMMIT_HEAD.unpack(reader.take(COMMIT_HEAD.size))
    if magic != COMMIT_MAGIC or commit.kind not in KIND_ROLE:
        raise Refused(E_BAD, 'not a commit object')
    commit.linked = [(reader.take(32), reader.take(32), reader.take(16),
                      reader.u8()) for _ in range(reader.u16())]
    commit.unlinked = [(reader.take(32), reader.take(32))
                       for _ in range(reader.u16())]
    commit.puts = (reader.u64(), reader.take(32))
    commit.deletes = (reader.u64(), reader.take(32))
    commit.live = reader.take(32)
    note = reader.u16()
    if note > CEILING['note']:
        raise Refused(E_BAD, 'note of %d bytes' % note)
    reader.take(note)
    commit.signed = b'tarsnap-history-1\0' + data[:reader.pos]
    commit.signature = reader.take(64)
    reader.end()
    commit.hash = sha256(data)
    return commit


def verify(public, signature, message):
    """True if `signature` of `message` is by Ed25519 key `public`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ed25519
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(
            signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def genesis(machine, store_id, keys):
    """H_0 of a machine; `keys` are its four public keys, joined."""
    return sha256(b'tarsnap-genesis-1' + U64.pack(machine) + store_id + keys)


def error_body(code, text):
    """Body of an ERROR frame; `text` becomes one line."""
    return U16.pack(code) + ' '.join(text.split()).encode('utf-8', 'replace')


##############################################################################
# Store
#
# Five verbs over immutable objects: get, put if absent, delete, list, size;
# and mend, by which repair alone puts a damaged one back as it was.
# S3Store below has the same five, and the same for who opens a store:
# writable(), prepare(), close(), and the attributes `name` and `threads`.
# Everything durable goes through the name `os` of this module, with os.write
# in a loop and os.fsync, so that a test can make the n-th call fail.  Knows
# nothing of what it stores.
##############################################################################

# link() is not to be had on FAT, some FUSE, SMB and network file systems.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

YOUNG = 600                     # seconds after which the kernel has synced


def write_all(fd, data):
    """Write all of `data` to `fd`, whatever a single write takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def fsync_dir(path):
    """Make the names in directory `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:     # some network file systems
            raise
    finally:
        os.close(fd)


def read_range(fd, offset, length):
    """`length` bytes at `offset`, fewer only at the end of the file."""
    pieces = []
    while length:
        piece = os.pread(fd, length, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b''.join(pieces)


def read_file(path, ceiling=MIB):
    """A small file whole."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_range(fd, 0, min(os.fstat(fd).st_size, ceiling))
    finally:
        os.close(fd)


def write_file(path, data, mode=0o600):
    """Replace `path` by `data`; durable on return, whole at any time."""
    temporary = '%s.%d.new' % (path, os.getpid())
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    fsync_dir(os.path.dirname(path))


class FileStore:
    """Objects as files under a directory: key `a/b` is the file `root/a/b`.

    A file appears by link(2) from a synced temporary, so it is whole from
    the first moment and never replaces another.  Used by any thread.

    What is there need not be durable: whoever made it may have died before
    his fsync, or not be that far.  So who reads all of a young one makes it
    durable first, or what a client is told of could be gone with the power.
    """

    threads = 4         # of the event loop, for what touches the store

    def __init__(self, root, temporary):
        self.root = root
        self.name = root                # for messages
        self.temporary = temporary      # directory on the same file system
        self.durable = set()            # directories synced up to the root
        self.kept = set()               # young objects that are durable
        self.synced = {}                # directory -> when, while young
        self.lock = threading.Lock()    # for file systems without links
        # Temporaries of two stores in one process must not meet.
        self.tag = os.urandom(4).hex()
        self.counter = itertools.count(1)

    def get(self, key, offset=0, length=None):
        """`length` bytes of an object, or all from `offset`: then it is
        durable on return.

        NoObject if it is not there; Damaged if it ends before.
        """
        path, young = self._path(key), False
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoObject('read', key) from None
        except OSError as e:
            raise StoreError('read', key, e.strerror) from None
        try:
            if length is None:
                status = os.fstat(fd)
                length = max(0, status.st_size - offset)
                young = status.st_ctime > time.time() - YOUNG
            data = read_range(fd, offset, length)
        except OSError as e:
            kind = Unreadable if e.errno == errno.EIO else StoreError
            raise kind('read', key, e.strerror) from None
        finally:
            os.close(fd)
        if len(data) != length:
            raise Damaged('read', key, 'short read (%d of %d)'
                          % (len(data), length))
        if young:
            try:
                self._keep(path, status.st_ctime)
            except OSError as e:
                raise StoreError('sync', key, e.strerror) from None
        return data

    def put(self, key, data):
        """Create an object from bytes or from the file named by a str.

        True if it was created, False if there is one.  On return, either
        way, the object that is there is durable; on StoreError nobody knows
        whether it was created.  A file is linked, not moved: its owner
        unlinks it, and writes to it no more.
        """
        path = self._path(key)
        try:
            self._directories(os.path.dirname(path))
            created = not os.path.lexists(path) and (
                self._put_file(data, path) if isinstance(data, str)
                else self._put_bytes(data, path))
            fsync_dir(os.path.dirname(path))
        except OSError as e:
            raise StoreError('write', key, e.strerror) from None
        self._kept(path)
        return created

    def mend(self, key, data):
        """Have `data` in the place of an object that is damaged, which is
        there whole, one or the other, at any time.  Durable on return.

        Only for what it was before, by its hash: nothing else is replaced.
        """
        path = self._path(key)
        try:
            self._put_bytes(data, path, os.rename)
            fsync_dir(os.path.dirname(path))
        except OSError as e:
            raise StoreError('write', key, e.strerror) from None

    def delete(self, key):
        """Remove an object; it may be gone already."""
        path = self._path(key)
        self.kept.discard(path)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as e:
            raise StoreError('delete', key, e.strerror) from None

    def list(self, prefix):
        """All keys that begin with `prefix`, in order."""
        found, places = [], [prefix.rpartition('/')[0]]
        while places:
            place = places.pop()
            above = place + '/' if place else ''
            try:
                with os.scandir(os.path.join(self.root, place)) as entries:
                    for entry in entries:
                        key = above + entry.name
                        if not key.startswith(prefix) or (
                                not place and key.startswith('.')):
                            continue
                        if not entry.is_dir():
                            found.append(key)
                        elif not (entry.name.startswith('.')
                                  or entry.is_symlink()):
                            places.append(key)
            except FileNotFoundError:
                pass
            except OSError as e:
                raise StoreError('list', prefix, e.strerror) from None
        return sorted(found)

    def size(self, key):
        """An object's size in bytes, or None if it is not there."""
        try:
            return os.stat(self._path(key)).st_size
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StoreError('size', key, e.strerror) from None

    def made(self, key):
        """When an object was made, in seconds by the store's clock; None if
        it is not there.
        """
        try:
            return int(os.stat(self._path(key)).st_mtime)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StoreError('size', key, e.strerror) from None

    def writable(self):
        """False if nothing can be written here."""
        return os.access(self.root, os.W_OK)

    def close(self):
        """Nothing of it is kept open."""

    def prepare(self):
        """Before the first put: remove what processes of this host left."""
        host = os.uname().nodename
        for name in os.listdir(self.temporary):
            owner, _, rest = name.rpartition('+')[0].rpartition('+')
            if owner == host and rest.isdigit() and not alive(int(rest)):
                os.unlink(os.path.join(self.temporary, name))

    def _path(self, key):
        assert not key.startswith('/') and '..' not in key, key
        return os.path.join(self.root, key)

    def _shared(self):
        """True if the group of the root may write, and so may read all."""
        return os.stat(self.root).st_mode & 0o020

    def _keep(self, path, changed):
        """Make an object durable that somebody made, with all above it.

        `changed` is its ctime, by a clock that is up to a tick behind.
        """
        place = os.path.dirname(path)
        if path in self.kept or changed < self.synced.get(place, 0) - 1:
            return
        now = time.time()
        fsync_dir(place)
        if len(self.synced) >= 1000:
            self.synced.clear()
        self.synced[place] = now
        while place != self.root and place not in self.durable:
            above = os.path.dirname(place)
            fsync_dir(above)
            self.durable.add(place)
            place = above
        self._kept(path)

    def _kept(self, path):
        if len(self.kept) >= 1000:
            self.kept.clear()
        self.kept.add(path)

    def _directories(self, path):
        """Make `path`; it and all above it are durable on return.

        Also those somebody else made: he may have died before his fsync.
        """
        if path in self.durable:
            return
        if path != self.root:
            above = os.path.dirname(path)
            self._directories(above)
            try:
                os.mkdir(path, 0o700)
                if self._shared():
                    os.chmod(path, 0o2770)
            except FileExistsError:
                pass
            fsync_dir(above)
        self.durable.add(path)

    def _put_bytes(self, data, path, place=None):
        name = '%s+%d+%s-%d' % (os.uname().nodename, os.getpid(), self.tag,
                                next(self.counter))
        temporary = os.path.join(self.temporary, name)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                     | os.O_CLOEXEC, 0o600)
        try:
            try:
                if self._shared():
                    os.fchmod(fd, 0o660)
                write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            return (place or self._link)(temporary, path)
        finally:
            unlink_quietly(temporary)

    def _put_file(self, source, path):
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            try:
                return self._link(source, path)
            except OSError as e:
                if e.errno != errno.EXDEV:
                    raise
            # The spool is on another file system.
            return self._put_bytes(
                read_range(fd, 0, os.fstat(fd).st_size), path)
        finally:
            os.close(fd)

    def _link(self, source, path):
        try:
            os.link(source, path)
            return True
        except FileExistsError:
            # NFS repeats a link() whose answer was lost, and then says it
            # exists, when it was this very call that made it.
            there, ours = os.stat(path), os.stat(source)
            return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
        except OSError as e:
            if e.errno not in NO_LINKS:
                raise
        return self._move(source, path)

    def _move(self, source, path):
        """Without links: test and rename under a lock of this host.

        Safe for processes of one host only, and documented so.
        """
        fd = os.open(os.path.join(self.root, '.lock'),
                     os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self.lock:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                if os.path.lexists(path):
                    return False
                os.rename(source, path)
                return True
        finally:
            os.close(fd)


def alive(pid):
    """True if there is a process `pid` on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def unlink_quietly(path):
    """Remove a file that may be gone, and that does no harm if it stays."""
    try:
        os.unlink(path)
    except OSError:
        pass


##############################################################################
# S3: signing
#
# Signature Version 4, which every S3 server knows.  Pure functions; the clock,
# the credentials and the wire belong to the sections below.
##############################################################################

Credentials = collections.namedtuple(
    'Credentials', 'access secret token expires')   # expires: seconds or None
ALGORITHM = 'AWS4-HMAC-SHA256'


def percent(text, safe=''):
    """`text` percent-encoded as S3 signs it: once, all but -_.~ and `safe`."""
    import urllib.parse
    return urllib.parse.quote(text, safe='-_.~' + safe)


def query_string(pairs):
    """[(name, value)] as S3 signs and we send it: encoded, then sorted."""
    return '&'.join('%s=%s' % pair for pair in sorted(
        (percent(name), percent(value)) for name, value in pairs))


def sign_request(credentials, region, stamp, method, path, query, headers):
    """The Authorization header of a request with `headers`, all of them.

    `path` and `query` are encoded; `stamp` is the time as 20261123T050000Z;
    `headers` has Host, X-Amz-Date and X-Amz-Content-Sha256 among them.
    """
    lines = sorted((name.lower(), ' '.join(value.split()))
                   for name, value in headers.items())
    names = ';'.join(name for name, _ in lines)
    digest = dict(lines)['x-amz-content-sha256']
    canonical = '\n'.join(
        [method, path, query] + ['%s:%s' % line for line in lines]
        + ['', names, digest])
    scope = [stamp[:8], region, 's3', 'aws4_request']
    key = b'AWS4' + credentials.secret.encode()
    for part in scope:
        key = hmac.digest(key, part.encode(), 'sha256')
    signature = hmac.new(key, '\n'.join(
        [ALGORITHM, stamp, '/'.join(scope),
         sha256(canonical.encode()).hex()]).encode(), 'sha256').hexdigest()
    return '%s Credential=%s/%s, SignedHeaders=%s, Signature=%s' % (
        ALGORITHM, credentials.access, '/'.join(scope), names, signature)


##############################################################################
# S3: credentials
#
# Where keys come from, in the order in which AWS's own tools look:
# tarsnapd.conf, the environment, a profile in shared files, the endpoint of a
# container, the metadata of an instance.  What expires is asked for anew in
# time.  ServerError says what was looked at.
##############################################################################

METADATA = 'http://169.254.169.254'
CONTAINER = 'http://169.254.170.2'
RENEW = 900             # seconds before they expire


def aws_profile(conf):
    """The profile of the shared files as a dict, empty if there is none.

    A profile asked for by name must be there.
    """
    asked = (conf.get('s3-profile') or os.environ.get('AWS_PROFILE')
             or os.environ.get('AWS_DEFAULT_PROFILE'))
    name, found = asked or 'default', {}
    sections = {'default'} if name == 'default' else set()
    services = {}
    for variable, path, section in (
            ('AWS_CONFIG_FILE', '~/.aws/config', 'profile ' + name),
            ('AWS_SHARED_CREDENTIALS_FILE', '~/.aws/credentials', name)):
        path = os.path.expanduser(os.environ.get(variable) or path)
        parsed = ini_read(path)
        for wanted in sections | {section}:
            found.update(parsed.get(wanted, {}))
        services.update(parsed)
    if asked and not found:
        raise ServerError('no profile %s in the shared AWS files' % asked)
    # What a section of services says is nearer than the profile.
    special = services.get('services ' + found.get('services', ''), {})
    for line in special.get('s3', '').splitlines():
        option, _, value = line.partition('=')
        if option.strip() == 'endpoint_url':
            found['endpoint_url'] = value.strip()
    return found


def ini_read(path):
    """The sections of a shared AWS file, {} if there is no file."""
    import configparser
    # A secret may hold a %, and a hand-written file a section twice.
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(read_file(path).decode('utf-8'), path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as e:
        raise ServerError('%s: %s' % (path, e.strerror)) from None
    except (configparser.Error, UnicodeDecodeError) as e:
        raise ServerError('%s: %s' % (path, ' '.join(str(e).split()))) from e
    return {name: dict(parser[name]) for name in parser.sections()}


def credentials_find(conf, profile):
    """The first Credentials found; ServerError if there are none."""
    env = os.environ.get
    for place, found in (
            ('tarsnapd.conf', (conf.get('s3-access-key'),
                               conf.get('s3-secret-key'),
                               conf.get('s3-session-token'))),
            ('the environment', (env('AWS_ACCESS_KEY_ID'),
                                 env('AWS_SECRET_ACCESS_KEY'),
                                 env('AWS_SESSION_TOKEN'))),
            ('the shared AWS files', (profile.get('aws_access_key_id'),
                                      profile.get('aws_secret_access_key'),
                                      profile.get('aws_session_token')))):
        if found[0] and found[1]:
            return Credentials(*found, None)
        if found[0] or found[1]:
            raise ServerError('%s: an S3 access key and its secret key belong '
                              'together, one is missing' % place)
    found = credentials_container() or credentials_instance()
    if not found:
        raise ServerError(
            'no S3 credentials: not in tarsnapd.conf, the environment, the '
            'shared AWS files, and from no container or instance')
    return found


def credentials_container():
    """Credentials from a container's endpoint, or None if it has none."""
    env = os.environ.get
    url = env('AWS_CONTAINER_CREDENTIALS_FULL_URI')
    if env('AWS_CONTAINER_CREDENTIALS_RELATIVE_URI'):
        url = CONTAINER + env('AWS_CONTAINER_CREDENTIALS_RELATIVE_URI')
    if not url:
        return None
    token = env('AWS_CONTAINER_AUTHORIZATION_TOKEN')
    try:
        if env('AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE'):
            token = read_file(env('AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE')
                              ).decode().strip()
        return credentials_parse(fetch(
            'GET', url, {'Authorization': token} if token else {}))
    except (OSError, ValueError, KeyError) as e:
        raise ServerError('S3 credentials from %s: %s' % (url, e)) from e


def credentials_instance():
    """Credentials of the instance's role (IMDSv2), or None without one."""
    if os.environ.get('AWS_EC2_METADATA_DISABLED', '').lower() == 'true':
        return None
    base = (os.environ.get('AWS_EC2_METADATA_SERVICE_ENDPOINT')
            or METADATA).rstrip('/') + '/latest/'
    role = base + 'meta-data/iam/security-credentials/'
    try:
        token = fetch('PUT', base + 'api/token', {
            'X-aws-ec2-metadata-token-ttl-seconds': '21600'})
        proof = {'X-aws-ec2-metadata-token': token}
        name = fetch('GET', role, proof).split()[0]
        return credentials_parse(fetch('GET', role + name, proof))
    except (OSError, ValueError, KeyError, IndexError):
        return None             # not an instance, or one without a role


def credentials_parse(text):
    """Credentials from what both kinds of endpoint answer."""
    import calendar
    found = json.loads(text)
    expires = found.get('Expiration')
    if expires:
        expires = calendar.timegm(time.strptime(
            expires[:19], '%Y-%m-%dT%H:%M:%S'))
    return Credentials(found['AccessKeyId'], found['SecretAccessKey'],
                       found.get('Token'), expires)


def fetch(method, url, headers):
    """The text at a link-local URL, by no proxy and without patience."""
    import urllib.request
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    with opener.open(request, timeout=1) as answer:
        return answer.read(64 * KIB).decode('utf-8')


##############################################################################
# S3: requests
#
# One bucket: signed requests over connections that are kept, tried again where
# that may help.  Knows status codes, not objects.  Used by any thread.
##############################################################################

# Seconds, unless the name says otherwise.  How often and how long is what
# AWS's own clients do ("standard" mode), with more patience: a backup waits.
S3_LIMIT = {
    'attempts': 6,              # number
    'in all': 60,               # no new attempt after
    'silence': 20,              # of a connection
    'first delay': 0.1,         # doubled by each attempt, and drawn from 0
    'first delay if slow': 1.0,     # when told to be slower
    'longest delay': 20,
    'tokens': 500,              # of the allowance; a repetition takes
    'tokens of a retry': 5,
    'idle connections': 32,     # number
    'answer': 64 * MIB,         # bytes
    'keys at once': 1000,       # number, in a page of a list
}

# Codes that say "later", whatever their status.
SLOW_CODES = {'SlowDown', 'Throttling', 'ThrottlingException',
              'ThrottledException', 'RequestThrottled', 'RequestLimitExceeded',
              'RequestThrottledException', 'TooManyRequestsException',
              'BandwidthLimitExceeded'}
LATER_CODES = {'RequestTimeout', 'RequestTimeoutException', 'BadDigest',
               'PriorRequestNotComplete', 'InternalError',
               'ConditionalRequestConflict', 'OperationAborted',
               'XAmzContentSHA256Mismatch'}
LATER_STATUS = {429, 500, 502, 503, 504, 509}


class Answer:
    """What S3 answered, from an HTTPResponse and its whole body."""

    def __init__(self, response, body):
        self.status = response.status
        self.headers = response.headers     # get() minds no case
        self.body = body
        self.tries = 1                  # how many requests it took
        self.code = ''                  # of an error, if S3 names one
        self.text = ''                  # its message
        self.reason = response.reason
        self.region = self.headers.get('x-amz-bucket-region') or ''
        if self.status >= 300 and body:
            try:
                root = xml_parse(body)
            except ValueError:
                return                  # from a proxy, say
            self.code = xml_text(root, 'Code')
            self.text = xml_text(root, 'Message')
            self.region = self.region or xml_text(root, 'Region')

    def __str__(self):
        text = '%d %s' % (self.status, self.code or self.reason)
        return ' '.join((text + (': ' + self.text if self.text else ''))
                        .split())[:300]

    def later(self):
        """True if the same request may succeed later."""
        # The answer to HEAD has no body that could name the conflict.
        return (self.status in LATER_STATUS or self.slow()
                or self.code in LATER_CODES
                or self.status == 409 and not self.code)

    def slow(self):
        """True if we are to make fewer requests."""
        return self.code in SLOW_CODES or self.status in (429, 503, 509)


def xml_parse(body):
    """The root of an XML answer; ValueError if it is none.

    No answer of S3 has a document type, and entities are a known bomb.
    """
    import xml.etree.ElementTree as tree
    try:
        if b'<!DOCTYPE' in body:
            raise ValueError('an answer with a document type')
        return tree.fromstring(body)
    except tree.ParseError as e:
        raise ValueError(str(e)) from None


def xml_all(element, name):
    """Descendants called `name`, in whatever name space."""
    return [x for x in element.iter() if x.tag.rpartition('}')[2] == name]


def xml_text(element, name):
    """The text of the first descendant called `name`, or ''."""
    found = xml_all(element, name)
    return (found[0].text or '') if found else ''


class Bucket:
    """Requests to one bucket, conf being the server's configuration."""

    def __init__(self, name, conf):
        self.name = name
        self.conf = conf
        self.profile = aws_profile(conf)
        env, own = os.environ.get, self.profile.get
        self.region = (conf.get('s3-region') or env('AWS_REGION')
                       or env('AWS_DEFAULT_REGION') or own('region')
                       or 'us-east-1')
        self.endpoint = self._endpoint_asked()
        self.virtual = self._virtual()
        self.split_endpoint()           # complain now, not at first use
        self.skew = 0                   # the server's clock less ours, seconds
        self.tokens = S3_LIMIT['tokens']
        self.credentials = None
        self.context = None             # ssl.SSLContext, when one is needed
        self.idle = []                  # connections, the last used last
        self.owner = os.getpid()        # of these; a fork must not share them
        self.lock = threading.Lock()    # of all that changes

    def _endpoint_asked(self):
        """The URL asked for, or '' for that of AWS in our region."""
        if self.conf.get('s3-endpoint'):
            return self.conf['s3-endpoint']
        env = os.environ.get
        if (env('AWS_IGNORE_CONFIGURED_ENDPOINT_URLS') or '').lower() == (
                'true'):
            return ''
        return (env('AWS_ENDPOINT_URL_S3') or env('AWS_ENDPOINT_URL')
                or self.profile.get('endpoint_url') or '')

    def _virtual(self):
        """True if the bucket stands in the host name, not in the path."""
        how = self.conf.get('s3-addressing') or 'auto'
        if how not in ('auto', 'path', 'virtual'):
            raise ServerError('s3-addressing is auto, path or virtual, not %s'
                              % how)
        # No certificate is good for a bucket with a dot in the host name.
        return how == 'virtual' or (
            how == 'auto' and not self.endpoint and '.' not in self.name)

    def split_endpoint(self):
        """(True for https, host, port or None) of where requests go."""
        import urllib.parse
        url = self.endpoint or 'https://s3.%s.amazonaws.com%s' % (
            self.region, '.cn' if self.region.startswith('cn-') else '')
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if (parts.scheme not in ('http', 'https') or not parts.hostname
                or port == -1 or parts.path.strip('/') or parts.query):
            raise ServerError('s3-endpoint %s is not http://HOST[:PORT] or '
                              'https://HOST[:PORT]' % url)
        host = parts.hostname
        if self.virtual:
            host = '%s.%s' % (self.name, host)
        return parts.scheme == 'https', host, port

    def where(self, key):
        """An object's place, for messages."""
        return 's3://%s/%s' % (self.name, key)

    def request(self, operation, key, method, query=(), headers=(), body=b'',
                digest=DIGEST_OF_NONE, good=(200,)):
        """The Answer to a request, with a status in `good`; else StoreError.

        `body` is bytes or a binary file, `digest` its SHA-256.  What may help
        is tried again, so a request must bear repetition; Answer.tries tells.
        """
        send = (method, key, query, dict(headers), body, digest)
        end = time.monotonic() + S3_LIMIT['in all']
        adjusted = set()
        for tries in itertools.count(1):
            answer, why = self._once(operation, key, send)
            if answer:
                answer.tries = tries
                if answer.status in good:
                    self._earn(tries)
                    return answer
                change = self._adjust(answer)
                if change and change not in adjusted:
                    adjusted.add(change)
                    continue
                why = str(answer)
            if (answer and not answer.later() or tries >= S3_LIMIT['attempts']
                    or time.monotonic() > end or not self._spend()):
                if tries > 1:
                    why += ' (tried %d times)' % tries
                denied = answer and answer.code == 'AccessDenied'
                raise (Forbidden if denied else StoreError)(
                    operation, self.where(key), why)
            time.sleep(self._delay(answer, tries))

    def _once(self, operation, key, send):
        """(Answer, '') or, when there was none, (None, why)."""
        import http.client
        connection = None
        try:
            headers, target = self._signed(operation, *send)
            connection = self._connection()
            answer = self._exchange(connection, send[0], target, headers,
                                    send[4])
        except (OSError, http.client.HTTPException, ValueError) as e:
            # ValueError: http.client about a header it will not send.
            if connection:
                connection.close()
            return None, '%s: %s' % (
                self.split_endpoint()[1], getattr(e, 'strerror', None)
                or str(e) or type(e).__name__)
        return answer, ''

    def _signed(self, operation, method, key, query, headers, body, digest):
        """(all headers, target) of a request made now."""
        credentials = self._credentials(operation, key)
        _, host, port = self.split_endpoint()
        stamp = time.strftime('%Y%m%dT%H%M%SZ',
                              time.gmtime(time.time() + self.skew))
        headers = dict(headers)
        if ':' in host:
            host = '[%s]' % host
        # As http.client does not say it: with the port if one was given.
        headers['Host'] = host if port is None else '%s:%d' % (host, port)
        headers['X-Amz-Date'] = stamp
        headers['X-Amz-Content-Sha256'] = digest.hex()
        if credentials.token:
            headers['X-Amz-Security-Token'] = credentials.token
        path = '/' + percent(key, '/')
        if not self.virtual:
            path = '/' + self.name + (path if key else '')
        query = query_string(query)
        headers['Authorization'] = sign_request(
            credentials, self.region, stamp, method, path, query, headers)
        if method == 'PUT':
            headers['Content-Length'] = str(body_size(body))
        return headers, path + ('?' + query if query else '')

    def _exchange(self, connection, method, target, headers, body):
        """Send one request and read its whole Answer."""
        if hasattr(body, 'seek'):
            body.seek(0)
        try:
            connection.request(method, target, body or None, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass    # it may have answered before it hung up, as for 403
        response = connection.getresponse()
        data = self._body(response)
        if response.will_close:
            connection.close()
        else:
            with self.lock:
                self.idle.append(connection)
                if len(self.idle) > S3_LIMIT['idle connections']:
                    self.idle.pop(0).close()
        return Answer(response, data)

    @staticmethod
    def _body(response):
        """All of an answer's body; IncompleteRead if it ends before."""
        most = S3_LIMIT['answer']
        length = response.length
        # Where the length is known, only read() minds an early end.
        data = response.read(most + 1) if length is None else (
            response.read() if length <= most else b'')
        if max(length or 0, len(data)) > most:
            raise OSError(errno.EMSGSIZE, 'the answer is too long')
        return data

    def _connection(self):
        """A connection nobody else uses: one that was kept, or a new one."""
        while True:
            with self.lock:
                if self.owner != os.getpid():
                    self.owner, self.idle = os.getpid(), []
                if not self.idle:
                    break
                connection = self.idle.pop()
            # Anything to read on an idle connection is its end.
            if connection.sock and not select.select(
                    [connection.sock], [], [], 0)[0]:
                return connection
            connection.close()
        return self._connect()

    def _connect(self):
        import http.client
        secure, host, port = self.split_endpoint()
        options = {'timeout': S3_LIMIT['silence'], 'blocksize': 256 * KIB}
        if not secure:
            return http.client.HTTPConnection(host, port, **options)
        with self.lock:
            if self.context is None:
                import ssl
                self.context = ssl.create_default_context(
                    cafile=self.conf.get('s3-ca-bundle')
                    or os.environ.get('AWS_CA_BUNDLE'))
        return http.client.HTTPSConnection(host, port, context=self.context,
                                           **options)

    def _credentials(self, operation, key):
        """Credentials that are good for some time yet."""
        with self.lock:
            now, old = time.time(), self.credentials
            if old is None or old.expires and now > old.expires - RENEW:
                try:
                    self.credentials = credentials_find(self.conf,
                                                        self.profile)
                except ServerError as e:
                    # Those we have may still do.
                    if old is None or now > old.expires:
                        raise StoreError(operation, self.where(key), e) from e
            return self.credentials

    def _adjust(self, answer):
        """Learn the region or the time from a refusal; what was learnt."""
        if answer.status in (301, 307, 400, 403) and answer.region and (
                answer.region != self.region):
            self.region = answer.region
            self.close()        # they lead to the old region
            return 'region'
        if answer.code == 'RequestTimeTooSkewed' and answer.headers.get(
                'Date'):
            import email.utils
            when = email.utils.parsedate_tz(answer.headers['Date'])
            if when:
                self.skew = email.utils.mktime_tz(when) - time.time()
                return 'time'
        return None

    def close(self):
        """Close the connections that are kept."""
        with self.lock:
            for connection in self.idle:
                connection.close()
            self.idle = []

    # The allowance: when most requests fail, repeating them makes it worse.

    def _spend(self):
        """Take the price of a repetition; False if it is not there."""
        with self.lock:
            if self.tokens < S3_LIMIT['tokens of a retry']:
                return False
            self.tokens -= S3_LIMIT['tokens of a retry']
            return True

    def _earn(self, tries):
        """A request succeeded: back with what it took, or with one."""
        with self.lock:
            self.tokens = min(S3_LIMIT['tokens'], self.tokens + (
                S3_LIMIT['tokens of a retry'] if tries > 1 else 1))

    @staticmethod
    def _delay(answer, tries):
        """Seconds before the next attempt: anything up to a growing limit,
        so that those who failed together do not come back together."""
        import random
        first = S3_LIMIT['first delay if slow' if answer and answer.slow()
                         else 'first delay']
        return random.random() * min(first * 2 ** (tries - 1),
                                     S3_LIMIT['longest delay'])


def body_size(body):
    """Bytes in a request's body."""
    if isinstance(body, bytes):
        return len(body)
    return os.fstat(body.fileno()).st_size


##############################################################################
# S3: store
#
# The five verbs over the objects of a bucket below a prefix.  Nothing is ever
# replaced: each object is put with If-None-Match, which prepare() tries out
# before anything else is written.  A put is done when S3 has said so.
##############################################################################


PROBE = b'The second of these is refused.\n'


class S3Store:
    """The store s3://BUCKET/PREFIX."""

    threads = 32        # the loop's: each waits for the network most times

    def __init__(self, url, conf, turns=None):
        scheme, _, rest = url.partition('://')
        bucket, _, prefix = rest.partition('/')
        prefix = prefix.strip('/')
        if (scheme != 's3' or not 3 <= len(bucket) <= 63
                or set(bucket.lower()) - set(BUCKET_LETTERS)):
            raise ServerError('store %s is not s3://BUCKET/PREFIX' % url)
        self.name = url
        self.turns = turns              # path that lock files begin with
        self.prefix = prefix + '/' if prefix else ''
        self.bucket = Bucket(bucket, conf)
        if conf.get('s3-checksum', 'yes') not in ('yes', 'no'):
            raise ServerError('s3-checksum is yes or no, not %s'
                              % conf['s3-checksum'])
        self.checksum = conf.get('s3-checksum') != 'no'

    def get(self, key, offset=0, length=None):
        """As FileStore.get.  A whole object is held against its SHA-256."""
        if length == 0:
            return b''
        headers = {}
        if offset or length is not None:
            headers['Range'] = 'bytes=%d-%s' % (
                offset, '' if length is None else offset + length - 1)
        answer = self._request('read', key, 'GET', headers=headers,
                               good=(200, 206, 404, 416))
        if answer.status == 404:
            raise self._missing('read', key, answer)
        place, data = self.bucket.where(self.prefix + key), answer.body
        if headers and answer.status == 200:
            raise StoreError('read', place, 'the server ignores Range')
        if answer.status == 416 or length not in (None, len(data)):
            raise Damaged('read', place, 'short read (%d of %d)' % (
                0 if answer.status == 416 else len(data), length or 0))
        digest = answer.headers.get('x-amz-meta-sha256')
        if not headers and digest and sha256(data).hex() != digest:
            raise Damaged('read', place, 'checksum does not match')
        return data

    def put(self, key, data):
        """As FileStore.put; durable as soon as S3 has confirmed it."""
        if isinstance(data, str):
            try:
                with open(data, 'rb') as file:
                    return self._put(key, file, file_digest(file))
            except OSError as e:
                raise StoreError('write', key, e.strerror) from None
        with self._turn(key):
            return self._put(key, data, sha256(data))

    @contextlib.contextmanager
    def _turn(self, key):
        """One put of a key at a time, of all processes of a server directory.

        Swift looks whether an object is there and then writes it: of four
        puts at the same moment more than one won 20 times of 25.
        """
        fd = -1
        if self.turns:
            try:
                fd = os.open('%s.%02x' % (self.turns, sha256(
                    key.encode())[0] % 64), os.O_RDWR | os.O_CREAT
                    | os.O_CLOEXEC, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as e:
                raise StoreError('write', key, 'its turn: %s'
                                 % e.strerror) from None
        try:
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    def mend(self, key, data):
        """As FileStore.mend."""
        self._put(key, data, sha256(data), {})

    def _put(self, key, body, digest, condition=None):
        nonce = os.urandom(16).hex()
        if condition is None:
            condition = {'If-None-Match': '*'}
        headers = {'Content-Type': 'application/octet-stream',
                   'x-amz-meta-nonce': nonce,
                   'x-amz-meta-sha256': digest.hex(), **condition}
        if self.checksum:
            headers['x-amz-checksum-sha256'] = base64.b64encode(
                digest).decode()
        answer = self._request('write', key, 'PUT', headers=headers,
                               body=body, digest=digest, good=(200, 412))
        if answer.status == 412 and answer.tries > 1:
            # An attempt whose answer was lost may have been the one.
            head = self._request('size', key, 'HEAD', good=(200, 404))
            return head.headers.get('x-amz-meta-nonce') == nonce
        return answer.status == 200

    def delete(self, key):
        """Remove an object; it may be gone already."""
        answer = self._request('delete', key, 'DELETE', good=(200, 204, 404))
        if answer.status == 404 and answer.code == 'NoSuchBucket':
            raise self._missing('delete', key, answer)

    def list(self, prefix):
        """All keys that begin with `prefix`, in order."""
        found, token = [], ''
        while True:
            query = [('list-type', '2'), ('prefix', self.prefix + prefix),
                     ('encoding-type', 'url'),
                     ('max-keys', str(S3_LIMIT['keys at once']))]
            if token:
                query.append(('continuation-token', token))
            answer = self.bucket.request(
                'list %s%s in' % (self.prefix, prefix), '', 'GET', query)
            page, token = self._page(prefix, answer)
            found += page
            if not token:
                return sorted(found)

    def _page(self, prefix, answer):
        """(keys, token of the next page or '') of a page of a list."""
        import urllib.parse
        place = self.bucket.where(self.prefix + prefix)
        try:
            root = xml_parse(answer.body)
            # Anything else would look like a bucket with nothing in it.
            if root.tag.rpartition('}')[2] != 'ListBucketResult':
                raise ValueError('the answer is not a list')
        except ValueError as e:
            raise StoreError('list', place, e) from e
        keys = [urllib.parse.unquote_plus(xml_text(x, 'Key'))
                for x in xml_all(root, 'Contents')]
        token = ''
        if xml_text(root, 'IsTruncated') == 'true':
            token = xml_text(root, 'NextContinuationToken')
            if not token:
                raise StoreError('list', place, 'a page without a next one')
        return [key[len(self.prefix):] for key in keys
                if key.startswith(self.prefix + prefix)], token

    def size(self, key):
        """An object's size in bytes, or None if it is not there."""
        answer = self._request('size', key, 'HEAD', good=(200, 404))
        return None if answer.status == 404 else int(
            answer.headers.get('Content-Length', 0))

    def made(self, key):
        """As FileStore.made."""
        import email.utils
        answer = self._request('size', key, 'HEAD', good=(200, 404))
        when = answer.headers.get('Last-Modified')
        return None if answer.status == 404 or not when else int(
            email.utils.parsedate_to_datetime(when).timestamp())

    def close(self):
        """Close the connections; the next request opens one again."""
        self.bucket.close()

    def writable(self):
        """True: what our keys may not do, prepare() finds out."""
        return True

    def prepare(self):
        """ServerError unless the server refuses to replace an object.

        Forbidden if our keys may not write.
        All that keeps two servers, or a request that is repeated, from
        overwriting each other rests on that; some servers ignore it.
        """
        for _ in range(2):
            if not self.put('probe', PROBE):
                return
        raise ServerError('%s: this S3 server replaces objects despite '
                          '"If-None-Match: *"; a store there could lose data'
                          % self.name)

    def _request(self, operation, key, method, **options):
        return self.bucket.request(operation, self.prefix + key, method,
                                   **options)

    def _missing(self, operation, key, answer):
        """The error for a 404."""
        place = self.bucket.where(self.prefix + key)
        if answer.code in ('NoSuchKey', ''):
            return NoObject(operation, place)
        return StoreError(operation, place, str(answer))


BUCKET_LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789.-_'


def file_digest(file):
    """SHA-256 of a binary file."""
    digest = hashlib.sha256()
    while True:
        piece = file.read(MIB)
        if not piece:
            return digest.digest()
        digest.update(piece)


##############################################################################
# Steps
#
# How generators of wishes are carried out: one alone, with a pause after each
# wish, or several side by side.  Does none of the wishes.  The event loop, in
# which a wish may take its time while others are served, goes its own way.
##############################################################################


def turns(steps, perform):
    """Carry `steps` out: a generator that pauses after each wish, with it.

    perform(wish) is asked for all but answers and waits; its StoreError,
    Refused or ProviderError is thrown in.  Returns what the steps return.
    """
    value = error = None
    while True:
        try:
            wish = steps.throw(error) if error else steps.send(value)
        except StopIteration as e:
            return e.value
        value = error = None
        if wish[0] == 'wait':
            time.sleep(wish[1])
        elif wish[0] != 'answer':
            try:
                value = perform(wish)
            except (StoreError, Refused, ProviderError) as e:
                error = e
        yield wish


def carry_out(steps, perform):
    """What `steps` return, carried out by perform(wish) as in turns."""
    going = turns(steps, perform)
    while True:
        try:
            next(going)
        except StopIteration as e:
            return e.value


def together(several):
    """Steps: run several steps side by side, one wish of each at a time.

    What each returned, or the exception it ended with.
    """
    results = [None] * len(several)
    running = [(i, steps, None) for i, steps in enumerate(several)]
    while running:
        asking, wishes = [], []
        for i, steps, value in running:
            try:
                wishes.append(steps.throw(value) if isinstance(
                    value, StoreError) else steps.send(value))
                asking.append((i, steps))
            except StopIteration as e:
                results[i] = e.value
            except (StoreError, Refused) as e:
                results[i] = e
        values = (yield ('all', wishes)) if wishes else []
        running = [pair + (value,) for pair, value in zip(asking, values)]
    return results


##############################################################################
# Segments
#
# A segment object packs what one transaction sent: a magic, entries (header,
# data), then a table with one row for each entry, then a footer.  A rebuild
# reads tables only.  Before it has its table a segment is a file in the
# spool, never memory, and each entry has a checksum, so that after a crash
# it is good up to the first entry that is not whole.
##############################################################################

SEGMENT_MAGIC = b'tarsnap-segment-1\0'
ENTRY_MAGIC = b'tse1'
ENTRY = struct.Struct('>4sc32sII')      # magic, class, name, length, CRC-32
ENTRY_SUM = struct.Struct('>4sc32sI')   # what the CRC covers before the data
ROW = struct.Struct('>32scQI32s')   # name, class, offset, length, SHA-256
FOOTER = struct.Struct('>QI32s16s')     # table offset, count, SHA-256, magic
FOOTER_MAGIC = b'tarsnap-segend-1'
TAIL = 256 * KIB        # read at once from a segment's end; mostly enough


class Segment:
    """A closed segment and its table.

    key, size in bytes, table (rows joined; None once a Spool keeps it),
    `table_hash`, its SHA-256, and `count`, the number of its rows.
    """

    __slots__ = ('key', 'size', 'table', 'table_hash', 'count')

    def __init__(self, key, size, table):
        self.key = key
        self.size = size
        self.table = table
        self.table_hash = sha256(table)
        self.count = len(table) // ROW.size


def segment_key(machine, tid, number, table_hash):
    """Where a segment is kept, the `number`-th of transaction `tid`.

    What is in it is in the key: two servers that have one transaction, or two
    tries, do not use one key for two contents.
    """
    return 'seg/%016x/%s/%06d-%s' % (machine, tid.hex(), number,
                                     table_hash[:16].hex())


def segment_number(key):
    """The number in a segment's key; in older stores nothing follows it."""
    return int(key.rpartition('/')[2].partition('-')[0])


def segment_load(key, size=None, count=None):
    """Steps: the Segment `key`, its table checked.

    NoObject if it is gone, Damaged if it is not whole.  With `count`, the
    number of its entries, no more is read than the table.
    """
    if size is None:
        size = yield ('size', key)
        if size is None:
            raise NoObject('read', key)
    if size < len(SEGMENT_MAGIC) + FOOTER.size:
        raise Damaged('read segment', key, 'only %d bytes long' % size)
    start = max(0, size - (TAIL if count is None else
                           count * ROW.size + FOOTER.size))
    tail = yield ('get', key, start, size - start)
    offset, count, digest, magic = FOOTER.unpack(tail[-FOOTER.size:])
    length = count * ROW.size
    if magic != FOOTER_MAGIC or offset + length + FOOTER.size != size:
        raise Damaged('read segment', key, 'its footer is damaged')
    if offset < start:
        tail = yield ('get', key, offset, size - offset)
        start = offset
    table = tail[offset - start:offset - start + length]
    if sha256(table) != digest:
        raise Damaged('read segment', key, 'its table is damaged')
    return Segment(key, size, table)


def table_classes(table):
    """The classes of a table's rows, joined."""
    return table[32::ROW.size]


def segment_lists(segment, cls):
    """Steps: [(row number, rows)] of the lists of class `cls` in it.

    Rows are names; of a list of revived blocks, those of ADDED.
    """
    out = []
    if cls not in table_classes(segment.table):     # quick: most have none
        return out
    for number, row in enumerate(ROW.iter_unpack(segment.table)):
        _, found, offset, length, digest = row
        if found == cls:
            whole = offset + length <= segment.size
            data = (yield ('get', segment.key, offset, length)) if (
                whole) else b''
            try:
                rows = list_rows(cls, data)
            except struct.error:
                whole = False
            if not whole or sha256(data) != digest:
                raise Damaged('read segment', segment.key,
                              'list %d is damaged' % number)
            out.append((number, rows))
    return out


def linked_puts(tables, withdrawn):
    """Rows put and not withdrawn, in order.

    Yields (table number, row number, name, class, length).  A withdrawal
    concerns what was put before it; the name may be put again.
    """
    ordinal = 0
    for t, table in enumerate(tables):
        for i, row in enumerate(ROW.iter_unpack(table)):
            name, cls, _, length, _ = row
            ordinal += 1
            if cls in BLOCK_CLASSES and (
                    not withdrawn or withdrawn.get(name, 0) < ordinal):
                yield t, i, name, cls, length


def list_rows(cls, data):
    """What a list of class `cls` holds; struct.error if that is none."""
    if cls == REVIVED_LIST:
        return list(ADDED_ROW.iter_unpack(data))
    return [name for name, in NAME.iter_unpack(data)]


# What a commit put and deleted must be known for as long as a client may ask,
# also when the blocks are gone.  So before a segment of a transaction may be
# dropped, an extract of its table is put under a key made from its own.

EXTRACT_MAGIC = b'tarsnap-extract1'
EXTRACT_ROW = struct.Struct('>32scI')   # name, class, length
NAME = struct.Struct('>32s')
CLEANER = b'cleaner\0'      # begins the transaction ids of the cleaner's own


def extract_key(key):
    """Where the extract of segment `key` is; None for one of the cleaner's.

    Such a segment holds what other segments put.
    """
    if key.split('/')[2].startswith(CLEANER.hex()):
        return None
    return 'list' + key[len('seg'):]


def extract_size(count, lists):
    """Bytes of the extract of `count` rows and `lists` bytes of lists."""
    return len(EXTRACT_MAGIC) + 4 + EXTRACT_ROW.size * count + lists + 32


def extract_encode(table, lists):
    """The extract of a table; `lists` holds the data of its rows of names.

    It is a function of the segment: whoever makes it makes the same.
    """
    rows = [EXTRACT_ROW.pack(name, cls, length) for name, cls, _, length, _
            in ROW.iter_unpack(table)]
    data = b''.join([EXTRACT_MAGIC, U32.pack(len(rows))] + rows + lists)
    return data + sha256(data)


def extract_decode(key, data):
    """(table, lists) of the extract in `data`, read from `key`.

    The digests in the table are zeros.  `lists` as segment_past.
    """
    if sha256(data[:-32]) != data[-32:] or not data.startswith(
            EXTRACT_MAGIC):
        raise Damaged('read extract', key, 'checksum does not match')
    try:
        reader = Reader(data[len(EXTRACT_MAGIC):-32])
        rows = list(EXTRACT_ROW.iter_unpack(
            reader.take(reader.u32() * EXTRACT_ROW.size)))
        table, lists, offset = [], [], len(SEGMENT_MAGIC)
        for number, (name, cls, length) in enumerate(rows):
            table.append(ROW.pack(name, cls, offset + ENTRY.size, length,
                                  ZERO32))
            offset += ENTRY.size + length
            if cls not in BLOCK_CLASSES:
                lists.append((number, cls,
                              list_rows(cls, reader.take(length))))
        reader.end()
    except (Refused, struct.error):
        raise Damaged('read extract', key, 'malformed') from None
    return b''.join(table), lists


def segment_past(key, size, digest, count):
    """Steps: (table, lists) of a segment of the log, which may be gone.

    `lists` is [(row number, class, rows)].  What the segment cannot tell, its
    extract does, or else its entries; if neither can, NoObject or Damaged.
    """
    try:
        segment = yield from segment_load(key, size, count)
        if segment.table_hash != digest:
            raise Damaged('read segment', key, 'its table is another one')
        return segment.table, (yield from segment_all_lists(segment))
    except (NoObject, Damaged) as e:
        error = e
    extract = extract_key(key)
    if extract:
        try:
            data = yield ('get', extract, 0, None)
            return extract_decode(extract, data)
        except NoObject:
            pass
        except (Damaged, struct.error):
            pass                    # scrub names it; here the segment counts
    if isinstance(error, Damaged):
        table = yield from segment_scan(key)
        if sha256(table) == digest:
            segment = Segment(key, size, table)
            return table, (yield from segment_all_lists(segment))
    raise error


def segment_all_lists(segment):
    """Steps: [(row number, class, rows)] of all lists in a segment."""
    lists = []
    for cls in (DELETED_LIST, WITHDRAWN_LIST, REVIVED_LIST):
        for i, names in (yield from segment_lists(segment, cls)):
            lists.append((i, cls, names))
    return lists


def segment_scan(key):
    """Steps: the table of a damaged segment, from the headers of its entries.

    It has a row for each entry whose checksum holds; what is between them is
    passed over.  If nothing was, it is the table that was lost.
    """
    table, pos, start, data = [], len(SEGMENT_MAGIC), 0, b''
    size = (yield ('size', key)) or 0
    while pos + ENTRY.size <= size:
        if pos + LIMIT['entry'] > start + len(data) < size:
            start, wanted = pos, min(LIMIT['read'], size - pos)
            try:
                data = yield ('get', key, start, wanted)
            except StoreError:      # what was read counts
                break
        row = entry_row(data, pos - start, pos)
        if row is not None:
            table.append(row)
            pos += ENTRY.size + ROW.unpack(row)[3]
            continue
        found = data.find(ENTRY_MAGIC, pos - start + 1)
        # A magic may begin in these bytes and end in the next.
        pos = start + (found if found >= 0 else max(
            pos - start + 1, len(data) - len(ENTRY_MAGIC) + 1))
    return b''.join(table)


def entry_row(data, at, offset):
    """The row for the entry at `at` in `data`, which is at `offset` of its
    segment; None if there is none that is whole.
    """
    if at + ENTRY.size > len(data):
        return None
    magic, cls, name, length, crc = ENTRY.unpack_from(data, at)
    at += ENTRY.size
    if magic != ENTRY_MAGIC or at + length > len(data):
        return None
    body = memoryview(data)[at:at + length]
    if entry_crc(cls, name, body) != crc:
        return None
    return ROW.pack(name, cls, offset + ENTRY.size, length, sha256(body))


def entry_crc(cls, name, data):
    """The checksum in an entry's header."""
    return zlib.crc32(data, zlib.crc32(ENTRY_SUM.pack(
        ENTRY_MAGIC, cls, name, len(data))))


##############################################################################
# Spool
#
# The open segment of each open transaction, DIR/spool/ID16/TIDHEX-000001, and
# beside it a lock file held by the process that owns the transaction.  Of what
# a client may send without end nothing stays in memory: the tables of closed
# segments, and the names it lists, are in files that have no name.  Calls
# nothing but the disk; decides nothing.
##############################################################################


class Tables:
    """Tables of closed segments, in a file below `directory`."""

    def __init__(self, directory):
        self.directory = directory
        self.file = None            # made when first needed
        self.places = []            # (offset, length)

    def add(self, table):
        """The next one."""
        if self.file is None:
            import tempfile
            self.file = tempfile.TemporaryFile(dir=self.directory)
        self.places.append((self.file.seek(0, os.SEEK_END), len(table)))
        write_all(self.file.fileno(), table)

    def __iter__(self):
        for place in self.places:
            yield read_range(self.file.fileno(), *place)

    def close(self):
        """Forget all of them."""
        if self.file:
            self.file.close()
        self.file, self.places = None, []


class Listed:
    """Names, each with a number, in a file made at `path` and unlinked.

    With `path` None it stays empty.  One thread at a time.
    """

    def __init__(self, path=None):
        self.path = path
        self.db = None              # made when first needed
        self.count = 0

    def __len__(self):
        return self.count

    def add(self, names, first=False):
        """Have `names`, pairs with their numbers; how many are new.  One that
        is there gets its new number, unless its `first` is to stay.
        """
        if self.db is None:
            self._open()
        new = self._run('INSERT OR IGNORE INTO listed VALUES (?, ?)', names,
                        True).rowcount
        if new < len(names) and not first:
            self._run('UPDATE listed SET number = ?2 WHERE name = ?1', names,
                      True)
        self.count += new
        return new

    def get(self, name, default=None):
        """The number of a name."""
        found = self.db and self._run(
            'SELECT number FROM listed WHERE name = ?', (name,)).fetchone()
        return found[0] if found else default

    def __contains__(self, name):
        return self.get(name) is not None

    def parts(self):
        """All names in order, in lists of a few thousand."""
        last = b''
        while self.db:
            part = [row[0] for row in self._run(
                'SELECT name FROM listed WHERE name > ? ORDER BY name '
                'LIMIT 4096', (last,))]
            if not part:
                return
            yield part
            last = part[-1]

    def close(self):
        """Forget all of them."""
        if self.db:
            self.db.close()
        self.db, self.count = None, 0

    def _open(self):
        import sqlite3
        unlink_quietly(self.path)
        self.db = sqlite3.connect(self.path, isolation_level=None,
                                  check_same_thread=False)
        # It is nobody else's, and is gone with this process.
        for setting in ('locking_mode = EXCLUSIVE', 'journal_mode = OFF',
                        'synchronous = OFF', 'cache_size = -1024'):
            self._run('PRAGMA ' + setting).fetchall()
        self._run('CREATE TABLE listed (name BLOB PRIMARY KEY, '
                  'number INTEGER) WITHOUT ROWID')
        self._run('BEGIN')          # for ever: what fits stays in the cache
        os.chmod(self.path, 0o600)
        os.unlink(self.path)

    def _run(self, statement, values=(), many=False):
        import sqlite3
        run = self.db.executemany if many else self.db.execute
        try:
            return run(statement, values)
        except sqlite3.Error as e:
            raise OSError(errno.EIO, 'names of a transaction: %s' % e) from e


class Spool:
    """The spool of one transaction, owned by this process.

    After an error of append or finish the state of the file is unknown: the
    owner must close() and open it anew, which scans it.
    """

    def __init__(self, directory, tid, lock):
        self.directory = directory
        self.stem = os.path.join(directory, tid.hex())
        self.lock = lock        # descriptor of the locked lock file
        self.fd = None          # of the open segment, None before it exists
        self.path = None
        self.number = 1         # of the open segment
        self.size = 0           # bytes written to it
        self.table = bytearray()
        self.closed = Tables(directory)     # of earlier segments
        self.rows = 0           # in these
        self.withdrawn = Listed(self.stem + '.withdrawn')   # by row
        self.deleted = Listed(self.stem + '.deleted')

    def append(self, entries):
        """Write `entries`, (class, name, data) each, at the end.

        On return they survive the death of this process, not of the host.
        """
        if self.fd is None:
            self._create()
        small, table, size = [], [], self.size
        for cls, name, data in entries:
            crc = entry_crc(cls, name, data)
            small.append(ENTRY.pack(ENTRY_MAGIC, cls, name, len(data), crc))
            size += ENTRY.size + len(data)
            table.append(ROW.pack(name, cls, size - len(data), len(data),
                                  hashlib.sha256(data).digest()))
            if cls not in BLOCK_CLASSES:
                self._list(len(self.table) // ROW.size + len(table), cls,
                           data)
            if len(data) < 16 * KIB:
                small.append(data)
            else:       # copying costs more than a call
                write_all(self.fd, b''.join(small))
                write_all(self.fd, data)
                small = []
        write_all(self.fd, b''.join(small))
        self.size = size
        self.table += b''.join(table)

    def finish(self):
        """Give the open segment its table; (path, Segment without key).

        Not durable yet: putting it into the store is.
        """
        table = bytes(self.table)
        write_all(self.fd, table + FOOTER.pack(
            self.size, len(table) // ROW.size, sha256(table), FOOTER_MAGIC))
        size = self.size + len(table) + FOOTER.size
        return self.path, Segment('', size, table)

    def keep(self, segment, lists=()):
        """A Segment of the transaction is closed; its table is kept here.

        `lists` are (row number, names) of what it withdraws, if that was not
        told to append().
        """
        for number, names in lists:
            self.withdrawn.add([(name, self.rows + number + 1)
                                for name in names])
        self.closed.add(segment.table)
        self.rows += segment.count
        segment.table = None

    def tables(self):
        """The tables of all segments of the transaction, one by one."""
        yield from self.closed
        yield bytes(self.table)

    def puts(self):
        """What was put and not withdrawn, as linked_puts."""
        return linked_puts(self.tables(), self.withdrawn)

    def puts_digest(self):
        """(count, SHA-256 of the names) of these."""
        digest, count = hashlib.sha256(), 0
        for put in self.puts():
            digest.update(put[2])
            count += 1
        return count, digest.digest()

    def puts_some(self, puts):
        """The next rows of ADDED of `puts`; none at the end."""
        return [ADDED_ROW.pack(*put[2:]) for put in itertools.islice(
            puts, CEILING['names'])]

    def clear(self):
        """The transaction was committed, and goes on with nothing."""
        self.rows = 0
        for scratch in (self.closed, self.withdrawn, self.deleted):
            scratch.close()

    def drop(self):
        """Forget the open segment; the next one has the next number."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
            unlink_quietly(self.path)
            self.number += 1
        self.size = 0
        self.table = bytearray()

    def scan(self, closed, keep):
        """Find what an earlier owner left of the open segment.

        `closed` are the numbers of segments the store knows: their files are
        removed unread, since a file and its object may be one inode.  With
        `keep` False nothing is taken over.
        """
        self.number = max(closed, default=0) + 1
        for name in sorted(os.listdir(self.directory)):
            path = os.path.join(self.directory, name)
            number = path[len(self.stem) + 1:]
            if not path.startswith(self.stem + '-') or not number.isdigit():
                continue
            if (int(number) < self.number or not keep
                    or os.stat(path).st_nlink > 1):
                unlink_quietly(path)
                self.number = max(self.number, int(number) + 1)
                continue
            self.number = int(number)
            self._adopt(path)
            break

    def close(self, remove=False):
        """Let go of the transaction; with `remove` nothing of it stays."""
        self.clear()
        empty = self.fd is None
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
            if remove:
                unlink_quietly(self.path)
        if remove or empty:
            unlink_quietly(self.stem + '.lock')
        unlink_quietly(self.stem + '.want')
        os.close(self.lock)     # and with it the lock

    def wanted(self):
        """True if another process asked for this transaction."""
        return os.path.exists(self.stem + '.want')

    def _create(self):
        self.path = '%s-%06d' % (self.stem, self.number)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL
                          | os.O_APPEND | os.O_CLOEXEC, 0o600)
        write_all(self.fd, SEGMENT_MAGIC)
        self.size = len(SEGMENT_MAGIC)

    def _adopt(self, path):
        """Take over `path` up to its last whole entry, and cut the rest."""
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        whole = os.fstat(self.fd).st_size
        self.size = self._scan_entries(whole)
        if self.size < whole:
            os.ftruncate(self.fd, self.size)
        if self.size == 0:
            write_all(self.fd, SEGMENT_MAGIC)
            self.size = len(SEGMENT_MAGIC)

    def _scan_entries(self, whole):
        """Fill the table; where the good part ends."""
        pos = len(SEGMENT_MAGIC)
        if read_range(self.fd, 0, pos) != SEGMENT_MAGIC:
            return 0
        while pos + ENTRY.size <= whole:
            magic, cls, name, length, crc = ENTRY.unpack(
                read_range(self.fd, pos, ENTRY.size))
            end = pos + ENTRY.size + length
            if magic != ENTRY_MAGIC or end > whole or length > 2 * MIB:
                break
            data = read_range(self.fd, pos + ENTRY.size, length)
            if zlib.crc32(data, zlib.crc32(ENTRY_SUM.pack(
                    magic, cls, name, length))) != crc:
                break
            self.table += ROW.pack(name, cls, pos + ENTRY.size, length,
                                   sha256(data))
            if cls not in BLOCK_CLASSES:
                self._list(len(self.table) // ROW.size, cls, data)
            pos = end
        return pos

    def _list(self, row, cls, data):
        """Row number `row`, from 1, of the open segment lists names."""
        lists = {WITHDRAWN_LIST: self.withdrawn, DELETED_LIST: self.deleted}
        if cls in lists:
            lists[cls].add([(name, self.rows + row)
                            for name in split_names(data)])


class SpoolDir:
    """DIR/spool: opens spools, and knows which are open elsewhere."""

    def __init__(self, root):
        self.root = root

    def open(self, machine, tid):
        """The Spool of a transaction, or None while another has it."""
        directory = self._directory(machine)
        path = os.path.join(directory, tid.hex() + '.lock')
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not lock_take(fd):
                os.close(fd)
                return None
            # Its last owner may have removed it between our open and lock.
            if same_file(fd, path):
                unlink_quietly(path[:-len('lock')] + 'want')
                return Spool(directory, tid, fd)
            os.close(fd)

    def want(self, machine, tid):
        """Ask whoever has a transaction to let go of it."""
        path = os.path.join(self._directory(machine), tid.hex() + '.want')
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC,
                         0o600))

    def open_elsewhere(self, machine, ours):
        """How many transactions of a machine other processes have open.

        `ours` are the tids this process has: opening and closing their lock
        files would drop our own locks (POSIX).
        """
        count = 0
        directory = self._directory(machine)
        for name in os.listdir(directory):
            stem, _, kind = name.partition('.')
            if kind != 'lock' or stem in {x.hex() for x in ours} or (
                    stem.startswith(CLEANER.hex())):
                continue
            try:
                fd = os.open(os.path.join(directory, name),
                             os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            count += not lock_take(fd)
            os.close(fd)
        return count

    def held(self, machine):
        """Bytes of a machine's open segments."""
        directory, size = self._directory(machine), 0
        for name in os.listdir(directory):
            try:
                st = os.stat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            if st.st_nlink == 1 and not name.startswith(CLEANER.hex()):
                size += st.st_size      # else it is in the store
        return size

    def sweep(self, machine, before):
        """Remove what nobody will ask for: what cleaners left, and
        transactions of which nothing was written since `before`, seconds.

        Not what a process has open; none of them may be this one.
        """
        directory = self._directory(machine)
        found = {}                  # tid in hex -> newest time
        for name in os.listdir(directory):
            try:
                when = os.stat(os.path.join(directory, name)).st_mtime
            except FileNotFoundError:
                continue
            found[name[:32]] = max(when, found.get(name[:32], 0))
        for stem, when in found.items():
            if when >= before and not stem.startswith(CLEANER.hex()):
                continue
            spool = self.open(machine, bytes.fromhex(stem))
            if spool is not None:
                spool.scan((), False)
                spool.close(True)

    def _directory(self, machine):
        path = os.path.join(self.root, '%016x' % machine)
        os.makedirs(path, 0o700, exist_ok=True)
        return path


def lock_take(fd):
    """Take the lock on an open file; False if another process has it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def same_file(fd, path):
    """True if the open file is still the one of that name."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


##############################################################################
# Log
#
# Entry k of a machine's log is one small object, made by put-if-absent, never
# changed and never deleted.  It holds the client's commit object verbatim and
# names segments, not blocks.  Records of the server's own (an abort that drops
# segments, cleaning) have a place in the log and an empty commit object; if
# such a record has segments, each of their blocks was copied from one of the
# segments it drops.  An erasure stands in place of the commit object: the
# operator deleted all there was, and says why.
##############################################################################

LOG_MAGIC = b'tarsnap-log-1\0\0\0'
LOG_HEAD = struct.Struct('>16sQQ32sQI')  # magic, machine, k, previous, time,
#                                          length of the commit object
LOG_SEGMENT = struct.Struct('>QQ32sI')  # number's key follows; size, table
LOG_TOTALS = struct.Struct('>QQ')       # live blocks, their stored bytes
ERASE_MAGIC = b'tarsnap-erase-1\0'      # length and text of the reason follow
ERASE_REASON = 1000                     # bytes of it at most


class Entry:
    """A log entry taken apart, or about to be made.

    `segments` is [(key, size, table hash, count, dead)]; `dead` is a bitmap,
    lsb first, of rows that are no live block: withdrawn, or live already.
    """

    __slots__ = ('machine', 'k', 'previous', 'time', 'commit', 'erased',
                 'segments', 'blocks', 'bytes', 'drops', 'hash')

    def __init__(self, machine, k, previous, when, commit=b''):
        self.machine = machine
        self.k = k
        self.previous = previous    # SHA-256 of entry k-1, zeros for k = 1
        self.time = when            # seconds; never before entry k-1's
        self.commit = commit        # C_n verbatim
        self.erased = None          # why all was deleted, if it was
        self.segments = []
        self.blocks = 0             # live after this entry
        self.bytes = 0              # their stored length
        self.drops = []             # keys of segments that nothing may use
        self.hash = None            # SHA-256 of the encoded entry


def log_key(machine, k):
    return 'log/%016x/%06d/%03d' % ((machine,) + divmod(k, 1000))


def log_encode(entry):
    """The object for `entry`; it ends in a SHA-256 of the rest."""
    commit = entry.commit
    if entry.erased is not None:
        reason = entry.erased.encode('utf-8')
        commit = ERASE_MAGIC + U16.pack(len(reason)) + reason
    out = [LOG_HEAD.pack(LOG_MAGIC, entry.machine, entry.k, entry.previous,
                         entry.time, len(commit)), commit,
           U32.pack(len(entry.segments))]
    for key, size, digest, count, dead in entry.segments:
        assert len(dead) == (count + 7) // 8, key
        out += (U16.pack(len(key)), key.encode(),
                U64.pack(size), digest, U32.pack(count), dead)
    out += (LOG_TOTALS.pack(entry.blocks, entry.bytes),
            U32.pack(len(entry.drops)))
    for key in entry.drops:
        out += (U16.pack(len(key)), key.encode())
    data = b''.join(out)
    return data + sha256(data)


def log_decode(machine, k, data):
    """The Entry in `data`, read from log_key(machine, k); Damaged if not."""
    key = log_key(machine, k)
    if len(data) < 32 or sha256(data[:-32]) != data[-32:]:
        raise Damaged('read log entry', key, 'checksum does not match')
    try:
        return log_parse(machine, k, data)
    except (Refused, struct.error, UnicodeDecodeError):
        raise Damaged('read log entry', key, 'malformed') from None


def log_parse(machine, k, data):
    """log_decode, after the checksum; Refused if malformed."""
    reader = Reader(data[:-32])
    magic, owner, number, previous, when, length = LOG_HEAD.unpack(
        reader.take(LOG_HEAD.size))
    if (magic, owner, number) != (LOG_MAGIC, machine, k):
        raise Refused(E_BAD, 'another object')
    entry = Entry(machine, k, previous, when, reader.take(length))
    if entry.commit.startswith(ERASE_MAGIC):
        erasure = Reader(entry.commit[len(ERASE_MAGIC):])
        entry.erased = erasure.take(erasure.u16()).decode('utf-8')
        erasure.end()
        entry.commit = b''
    for _ in range(reader.u32()):
        key = reader.take(reader.u16()).decode('ascii')
        size, digest, count = reader.u64(), reader.take(32), reader.u32()
        entry.segments.append((key, size, digest, count,
                               reader.take((count + 7) // 8)))
    entry.blocks, entry.bytes = reader.u64(), reader.u64()
    entry.drops = [reader.take(reader.u16()).decode('ascii')
                   for _ in range(reader.u32())]
    reader.end()
    entry.hash = sha256(data)
    return entry


class Loaded:
    """What the index needs to apply one log entry, read from the store."""

    __slots__ = ('entry', 'commit', 'after', 'lost', 'tables', 'dead',
                 'deleted', 'revived')

    def __init__(self, entry):
        self.entry = entry
        self.commit = commit_decode(entry.commit) if entry.commit else None
        self.after = entry.k - 1    # where the index must stand
        self.lost = []              # (key, what is wrong) of what is missing
        self.tables = []            # rows of each of its segments; None for
        #                             one of the cleaner's that is gone
        self.dead = []              # for each, as in the entry
        self.deleted = []           # names
        self.revived = []           # rows of ADDED

    def follow(self, k, lost):
        """It comes after entry k, with what was lost in between."""
        self.after = k
        self.lost[:0] = lost

    def add(self, table, lists, dead):
        """The next segment, as segment_past returns it."""
        self.tables.append(table)
        self.dead.append(dead)
        kind = self.commit.kind if self.commit else None
        for _, cls, rows in lists:
            if (kind, cls) == (KIND_DELETE, DELETED_LIST):
                self.deleted += rows
            if (kind, cls) == (KIND_UNDELETE, REVIVED_LIST):
                self.revived += rows


class Ahead:
    """What the log drops after the entry that is being read."""

    __slots__ = ('k', 'drops')

    def __init__(self):
        self.k = 0                  # entries up to it have been looked at
        self.drops = set()          # keys

    def find(self, machine, k, key):
        """Steps: True if an entry from k on drops segment `key`."""
        self.k = max(self.k, k - 1)
        while key not in self.drops:
            try:
                data = yield ('get', log_key(machine, self.k + 1), 0, None)
                self.drops.update(log_decode(machine, self.k + 1, data).drops)
            except LOST:
                return False
            self.k += 1
        return True


# What the index does without; any other error may pass, and stops it.
LOST = (NoObject, Damaged, Unreadable)


def log_entries(machine, k, previous, most):
    """Steps: (entries, error): up to `most` from k on, fewer before one that
    cannot be used; the error says why, NoObject for the end of the log.

    `previous` is entry k-1's hash.
    """
    keys = [log_key(machine, k + i) for i in range(most)]
    entries = []
    try:
        for key, data in zip(keys, (yield ('all', [
                ('get', key, 0, None) for key in keys]))):
            if isinstance(data, StoreError):
                return entries, data
            entry = log_decode(machine, k + len(entries), data)
            if entry.previous != previous:
                raise Damaged('read log entry', key,
                              'does not follow the one before')
            previous = entry.hash
            entries.append(entry)
    except Damaged as e:
        return entries, e
    return entries, None


def log_last(number, keys):
    """The number of the last log entry among store keys."""
    last = 0
    for key in keys:
        parts = key.split('/')[2:]
        if len(parts) == 2 and all(x.isdigit() for x in parts):
            last = max(last, int(parts[0]) * 1000 + int(parts[1]))
    return last


def log_beyond(machine, k, previous, error):
    """Steps: ([Entry], lost): the first from k on that can be read at all, and
    [(key, what is wrong)] of those before it; ([], []) if there is none.

    `previous` is entry k-1's hash, `error` why entry k could not be used.
    That may have passed, or the entry been written since: then nothing is
    wrong.
    """
    keys = yield ('list', 'log/%016x/' % machine)
    lost = []
    for number in range(k, log_last(machine, keys) + 1):
        key = log_key(machine, number)
        try:
            entry = log_decode(machine, number, (yield ('get', key, 0, None)))
        except LOST as e:
            lost.append((key, e.reason))
        else:
            if not lost and entry.previous != previous:
                lost.append((key, error.reason))
            return [entry], lost
    return [], []


def log_load(machine, entries, ahead):
    """Steps: `entries`, which follow each other, as Loaded.

    `ahead` is an Ahead for all of one catching up.
    """
    found = iter((yield from together([
        segment_past(*segment[:4]) for entry in entries
        for segment in entry.segments])))
    out = []
    for entry in entries:
        loaded = Loaded(entry)
        for key, _, _, _, dead in entry.segments:
            past = next(found)
            # What a later entry copied again may be gone, if nothing else.
            if isinstance(past, NoObject) and not extract_key(key) and (
                    yield from ahead.find(machine, entry.k + 1, key)):
                past = None, ()
            if isinstance(past, LOST):
                loaded.lost.append((key, past.reason))
                # Which rows are dead is not known without all of them.
                table, dead = (yield from segment_scan(key)), None
                past = table, ()
            if isinstance(past, Exception):
                raise past
            loaded.add(*past, dead)
        out.append(loaded)
    return out


##############################################################################
# Index
#
# One SQLite file for each machine: live blocks and where they are, live
# archives, commits, segments; `kept`, deleted blocks whose segment no log
# entry has dropped, which can be revived; and the log entries themselves.  A
# function of the log, disposable.  All that one log entry does, and its number
# k, is one SQLite transaction; whoever comes second finds k taken.  Called by
# the driver only, from any thread.
#
# Where a part of the log or of its segments cannot be read, the index says so
# in `lost`, and goes on: what it has can be read, since every client holds
# every block against its name.  Nothing may be written then, for the totals
# and what is live are not known.
##############################################################################

INDEX_VERSION = 4
FIND = 256                  # names in one SELECT
INDEX_TABLES = ('meta', 'log', 'lost', 'commits', 'archives', 'segments',
                'blocks', 'kept', 'erased')
INDEX_SCHEMA = '''
CREATE TABLE meta (id INTEGER PRIMARY KEY, k INTEGER, log_hash BLOB,
    n INTEGER, head BLOB, time INTEGER, blocks INTEGER, bytes INTEGER);
CREATE TABLE log (k INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE lost (key TEXT PRIMARY KEY, what TEXT) WITHOUT ROWID;
CREATE TABLE commits (n INTEGER PRIMARY KEY, hash BLOB, k INTEGER,
    time INTEGER);
CREATE TABLE archives (id BLOB PRIMARY KEY, record BLOB, lineage BLOB,
    state INTEGER, time INTEGER) WITHOUT ROWID;
CREATE TABLE segments (seg INTEGER PRIMARY KEY, key TEXT UNIQUE, k INTEGER,
    size INTEGER, count INTEGER, lists INTEGER, live INTEGER, bytes INTEGER,
    dropped INTEGER);
CREATE TABLE blocks (name BLOB PRIMARY KEY, seg INTEGER, offset INTEGER,
    length INTEGER, class BLOB) WITHOUT ROWID;
CREATE TABLE kept (name BLOB PRIMARY KEY, seg INTEGER, offset INTEGER,
    length INTEGER, class BLOB, time INTEGER) WITHOUT ROWID;
CREATE INDEX kept_segments ON kept (seg);
CREATE TABLE erased (k INTEGER, time INTEGER, reason TEXT);
INSERT INTO meta VALUES (1, 0, zeroblob(32), 0, x'', 0, 0, 0);
'''

# k, SHA-256 of log entry k, n, H_n (empty for n = 0), receive time of entry k,
# live blocks, their stored bytes, live archives; what of the log or of its
# segments the index does without, in words, or None; when the operator erased
# it all, and why, or None; True before the index has seen the end of the log.
State = collections.namedtuple(
    'State',
    'k log_hash n head time blocks bytes archives lost erased fresh')
Erased = collections.namedtuple('Erased', 'time reason')


def bit(bitmap, i):
    return bitmap[i >> 3] >> (i & 7) & 1


def bitmap_of(flags):
    """Flags (0 or 1 each) as bytes, lsb first."""
    out = bytearray((len(flags) + 7) // 8)
    for i, flag in enumerate(flags):
        if flag:
            out[i >> 3] |= 1 << (i & 7)
    return bytes(out)


def rollback(db):
    """Take a transaction back, if SQLite has not: out of space, it has."""
    if db.in_transaction:
        db.execute('ROLLBACK')


def tables_make(db, schema, version):
    """Make the tables of an empty SQLite file; True if they were made.

    sqlite3.DatabaseError if there are those of another version.
    """
    import sqlite3
    db.execute('BEGIN IMMEDIATE')
    found = db.execute('PRAGMA user_version').fetchone()[0]
    if found == 0:
        for statement in schema.split(';'):
            db.execute(statement)
        db.execute('PRAGMA user_version = %d' % version)
    db.execute('COMMIT')
    if found not in (0, version):
        raise sqlite3.DatabaseError('made by another version')
    return found == 0


class Index:
    """The index of one machine; any thread, one at a time."""

    def __init__(self, path, scratch=False):
        self.path = path
        self.scratch = scratch          # nobody needs it after a crash
        self.lock = threading.Lock()
        self.db = None
        self.fresh = False              # see State
        self.doubt = None               # why it may be of another log, words
        self.asked = 0                  # when that was looked at
        import sqlite3
        try:
            self._open(sqlite3)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as e:
            # Disposable, but not if it is only locked or cannot be opened.
            self.close()
            if isinstance(e, sqlite3.OperationalError):
                raise
            self.remove()
            self._open(sqlite3)

    def _open(self, sqlite3):
        self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None,
                                  check_same_thread=False)
        run = self.db.execute
        run('PRAGMA journal_mode = %s' % (
            'TRUNCATE' if self.scratch else 'WAL')).fetchall()
        # OFF could leave an index that looks whole after a power cut.
        run('PRAGMA synchronous = %s' % (
            'OFF' if self.scratch else 'NORMAL'))
        run('PRAGMA cache_size = -4096')
        self.cache = 4                  # MiB
        if tables_make(self.db, INDEX_SCHEMA, INDEX_VERSION):
            self.fresh = True
        os.chmod(self.path, 0o600)

    def close(self):
        if self.db:
            self.db.close()
            self.db = None

    def remove(self):
        """Close, and remove the files."""
        self.close()
        for suffix in ('', '-wal', '-shm'):
            unlink_quietly(self.path + suffix)

    def state(self):
        """Where this index stands, as State."""
        row = self.db.execute(
            'SELECT k, log_hash, n, head, time, blocks, bytes, '
            '(SELECT count(*) FROM archives), '
            '(SELECT key || \': \' || what FROM lost LIMIT 1) FROM meta'
            ).fetchone()
        if row is None:
            import sqlite3
            raise sqlite3.DatabaseError('it does not say where it stands')
        erased = self.db.execute('SELECT time, reason FROM erased').fetchone()
        return State(*row[:-1], row[-1] or self.doubt,
                     erased and Erased(*erased), self.fresh)

    def at(self, k, method, *args):
        """Call a method, if this index knows log entry k; else StoreError.

        Whoever has seen it at k would take an index that was thrown away
        since for a log that says nothing: that a segment was not committed,
        that a block is not live.
        """
        if self.db.execute('SELECT k FROM meta').fetchone()[0] < k:
            raise StoreError('index', 'log entry %d' % k,
                             'is being made anew')
        return getattr(self, method)(*args)

    def lost(self):
        """[(key, what is wrong)] of all that this index does without."""
        return self.db.execute('SELECT key, what FROM lost').fetchall()

    def log_entry(self, k):
        """Log entry k, encoded, as it was when it was applied, or None."""
        row = self.db.execute('SELECT data FROM log WHERE k = ?', (k,)
                              ).fetchone()
        return row and row[0]

    def commit_at(self, n):
        """(H_n, k, receive time) of commit n, or None."""
        return self.db.execute('SELECT hash, k, time FROM commits '
                               'WHERE n = ?', (n,)).fetchone()

    def archives(self, ids=None):
        """Live (archive id, record, lineage, state, time), by id."""
        rows = self.db.execute('SELECT id, record, lineage, state, time '
                               'FROM archives ORDER BY id').fetchall()
        if ids is not None:
            wanted = set(ids)
            rows = [row for row in rows if row[0] in wanted]
        return rows

    def live(self, names):
        """The set of those of `names` that are live blocks."""
        ask = self.db.execute
        return {name for name in names if ask(
            'SELECT 1 FROM blocks WHERE name = ?', (name,)).fetchone()}

    def lengths(self, names):
        """{name: (class, stored length)} of the live ones of `names`."""
        out = {}
        for name in names:
            row = self.db.execute('SELECT class, length FROM blocks '
                                  'WHERE name = ?', (name,)).fetchone()
            if row:
                out[name] = row
        return out

    def kept(self, names):
        """{name: (class, stored length)} of deleted ones that are kept."""
        places = zip(names, self.find(names, 'kept'))
        return {name: (row[3], row[2]) for name, row in places if row}

    def find(self, names, table='blocks'):
        """For each name (segment key, offset, length, class), or None.

        `table` is `blocks` for those that are live, or `kept`.
        """
        here = {'blocks': '', 'kept': 'AND s.dropped = 0'}[table]
        found = {}
        for at in range(0, len(names), FIND):
            some = names[at:at + FIND]
            found.update((row[0], row[1:]) for row in self.db.execute(
                'SELECT b.name, s.key, b.offset, b.length, b.class FROM %s b '
                'JOIN segments s ON s.seg = b.seg WHERE b.name IN (%s) %s'
                % (table, ', '.join('?' * len(some)), here), some))
        return [found.get(name) for name in names]

    def keeping(self, since):
        """{segment key: stored bytes} of what was deleted at time `since`
        or later: no log entry may drop these before the delete delay is over.
        """
        return dict(self.db.execute(
            'SELECT s.key, sum(k.length) FROM kept k '
            'JOIN segments s ON s.seg = k.seg AND s.dropped = 0 '
            'WHERE k.time >= ? GROUP BY s.key', (since,)))

    def segments_of(self, prefix):
        """[(key, dropped)] of the log's segments whose key begins so."""
        return self.db.execute(
            'SELECT key, dropped FROM segments WHERE key >= ? AND key < ?',
            (prefix, prefix + '\x7f')).fetchall()

    def entries(self):
        """How many entries the log's segments have."""
        return self.db.execute('SELECT coalesce(sum(count), 0) FROM segments'
                               ).fetchone()[0]

    def segments_live(self):
        """[(key, size, count, lists, live, bytes)] of those not dropped, in
        log order: bytes, rows, bytes of lists, live blocks, their bytes.
        """
        return self.db.execute(
            'SELECT key, size, count, lists, live, bytes FROM segments '
            'WHERE dropped = 0 ORDER BY seg').fetchall()

    def survivors(self, key, table):
        """Numbers of the rows of segment `key` that are live copies."""
        ask = self.db.execute
        found = ask('SELECT seg FROM segments WHERE key = ?', (key,)
                    ).fetchone() or (None,)
        return [i for i, (name, cls, offset, _, _)
                in enumerate(ROW.iter_unpack(table))
                if cls in BLOCK_CLASSES and ask(
                    'SELECT seg, offset FROM blocks WHERE name = ?',
                    (name,)).fetchone() == (found[0], offset)]

    def check_move(self, k, sources, tables, copies, since):
        """(sources that can be dropped, bitmap of dead rows of each table)
        if this index stands at k, else None.

        `tables` are those of segments `copies`, into which the live blocks of
        segments `sources` have been copied.  Nothing can be dropped if one of
        the copies was, nor what holds a block deleted at `since` or later.
        """
        self.db.execute('BEGIN')
        try:
            if self.state().k != k:
                return None
            return self._check_move(sources, tables, copies, since)
        finally:
            rollback(self.db)

    def _check_move(self, sources, tables, copies, since):
        ask = self.db.execute
        left = {}               # number -> [key, live blocks not copied]
        keeping = self.keeping(since)
        known = [ask('SELECT 1 FROM segments WHERE key = ?', (key,)
                     ).fetchone() for key in copies]
        for key in sources:
            seg, live, dropped = ask('SELECT seg, live, dropped FROM segments'
                                     ' WHERE key = ?', (key,)).fetchone()
            if not dropped and not any(known) and key not in keeping:
                left[seg] = [key, live]
        # Of another length it is another copy of the same block.
        homes = [[ask('SELECT seg FROM blocks WHERE name = ? AND length = ?',
                      (row[0], row[3])).fetchone()
                  for row in ROW.iter_unpack(table)] for table in tables]
        for home in itertools.chain(*homes):
            if home and home[0] in left:
                left[home[0]][1] -= 1
        # One that holds more than was copied stays as it is.
        empty = {seg for seg in left if left[seg][1] == 0}
        return ([left[seg][0] for seg in sorted(empty)],
                [bitmap_of([not (home and home[0] in empty) for home in part])
                 for part in homes])

    def check(self, k, change):
        """history_check against this index if it stands at k, else None."""
        self.db.execute('BEGIN')
        try:
            state = self.state()
            return history_check(self, state, change) if (
                state.k == k) else None
        finally:
            rollback(self.db)

    def apply(self, batch):
        """Apply Loaded log entries in order, in one transaction; State.

        Those that another process has applied meanwhile are passed over.
        """
        self._make_room(sum(segment[3] for loaded in batch
                            for segment in loaded.entry.segments))
        self.db.execute('BEGIN IMMEDIATE')
        try:
            k = self.state().k
            for loaded in batch:
                if loaded.after == k:
                    self._apply_entry(loaded)
                    k = loaded.entry.k
            state = self.state()
            self.db.execute('COMMIT')
        except BaseException:
            rollback(self.db)
            raise
        return state

    def _make_room(self, rows):
        """Have 64 MiB of cache for many rows, 4 MiB for few.

        Names are random: with a small cache each row costs a page.  990 000
        rows took 8.8 seconds of CPU instead of 13.8.
        """
        wanted = 64 if rows >= LIMIT['rows with room'] else 4
        if wanted != self.cache:
            self.db.execute('PRAGMA cache_size = -%d' % (wanted * KIB))
            if wanted < self.cache:
                self.db.execute('PRAGMA shrink_memory').fetchall()
            self.cache = wanted

    def reset(self):
        """Forget everything; the next use catches up from nothing."""
        run = self.db.execute
        run('BEGIN IMMEDIATE')
        for table in INDEX_TABLES:
            run('DROP TABLE IF EXISTS ' + table)
        for statement in INDEX_SCHEMA.split(';'):
            run(statement)
        run('COMMIT')
        self.fresh, self.doubt = True, None
        return self.state()

    def dump(self):
        """Every row that counts as a line of text, in an order of its own.

        What is kept in a dropped segment counts no more; it may still be
        there if its process died in the wrong moment.
        """
        lines = []
        for table in INDEX_TABLES:
            where = '' if table != 'kept' else (
                'WHERE seg IN (SELECT seg FROM segments WHERE NOT dropped)')
            for row in self.db.execute('SELECT * FROM %s %s ORDER BY 1'
                                       % (table, where)):
                lines.append(' '.join([table] + [
                    x.hex() if isinstance(x, bytes) else str(x)
                    for x in row]))
        return lines

    def _apply_entry(self, loaded):
        entry, commit = loaded.entry, loaded.commit
        state = self.state()
        blocks, size = state.blocks, state.bytes
        self.db.executemany('INSERT OR IGNORE INTO lost VALUES (?, ?)',
                            loaded.lost)
        whole = not (loaded.lost or state.lost)
        numbers = [self._add_segment(entry.k, table, *segment[:4])
                   for segment, table in zip(entry.segments, loaded.tables)]
        if commit and commit.kind == KIND_NUKE:
            blocks, size = self._remove_all(entry.time)
        if entry.erased is not None:
            blocks, size = self._erase(entry)
        if commit and commit.kind == KIND_WRITE:
            for number, table, dead in zip(numbers, loaded.tables,
                                           loaded.dead):
                added = self._add_blocks(number, table, dead)
                blocks, size = blocks + added[0], size + added[1]
        if loaded.deleted:
            gone = self._remove_blocks(set(loaded.deleted), entry.time)
            blocks, size = blocks - gone[0], size - gone[1]
        back = self._revive_blocks(row[0] for row in loaded.revived)
        blocks, size = blocks + back[0], size + back[1]
        if not whole:
            blocks, size = entry.blocks, entry.bytes
        elif (blocks, size) != (entry.blocks, entry.bytes):
            raise Damaged('apply log entry', log_key(entry.machine, entry.k),
                          'totals differ from what it says')
        self._move_archives(entry, commit)
        for key in entry.drops:
            self._drop_segment(entry.k, key)
        if commit is None:
            for number, table, dead in zip(numbers, loaded.tables,
                                           loaded.dead):
                self._move_blocks(number, table or b'', dead, whole)
        n, head = state.n, state.head
        if commit:
            n, head = commit.n, commit.hash
            self.db.execute('INSERT INTO commits VALUES (?, ?, ?, ?)',
                            (n, head, entry.k, entry.time))
        self.db.execute('INSERT INTO log VALUES (?, ?)',
                        (entry.k, log_encode(entry)))
        self.db.execute(
            'UPDATE meta SET k = ?, log_hash = ?, n = ?, head = ?, time = ?, '
            'blocks = ?, bytes = ?', (entry.k, entry.hash, n, head,
                                      entry.time, blocks, size))

    def _add_segment(self, k, table, key, size, _, count):
        table = table or b''
        lists = 0 if not set(table_classes(table)) - BLOCK_BYTES else sum(
            row[3] for row in ROW.iter_unpack(table)
            if row[1] not in BLOCK_CLASSES)
        # One that was adopted is there already.
        self.db.execute(
            'INSERT INTO segments (key, k, size, count, lists, live, bytes, '
            'dropped) VALUES (?, ?, ?, ?, ?, 0, 0, 0) ON CONFLICT (key) '
            'DO UPDATE SET k = excluded.k', (key, k, size, count, lists))
        return self.db.execute('SELECT seg FROM segments WHERE key = ?',
                               (key,)).fetchone()[0]

    def _drop_segment(self, k, key):
        # A segment that was never committed is known from its drop on.
        self.db.execute(
            'INSERT INTO segments (key, k, size, count, lists, live, bytes, '
            'dropped) VALUES (?, ?, 0, 0, 0, 0, 0, ?) ON CONFLICT (key) '
            'DO UPDATE SET dropped = excluded.dropped', (key, k, k))

    def _move_blocks(self, number, table, dead, whole):
        """The live copies of these blocks are in segment `number` now.

        Each was in a segment that is dropped by now.  Not always by the same
        entry: a copy made in between may be gone before this index saw it.
        Unless the index is `whole`, it may not know of the block.
        """
        run = self.db.execute
        for i, row in enumerate(ROW.iter_unpack(table)):
            if dead and bit(dead, i):
                continue
            name, cls, offset, length, _ = row
            found = run('SELECT b.seg, b.length, s.dropped FROM blocks b '
                        'JOIN segments s ON s.seg = b.seg WHERE name = ?',
                        (name,)).fetchone()
            if found is None or found[1] != length or not found[2]:
                if whole:
                    raise Damaged('index', name.hex(),
                                  'cannot have been moved')
                self._replace_block(name, number, offset, length, cls)
                continue
            run('UPDATE blocks SET seg = ?, offset = ? WHERE name = ?',
                (number, offset, name))
            run('UPDATE segments SET live = live - 1, bytes = bytes - ? '
                'WHERE seg = ?', (length, found[0]))
            run('UPDATE segments SET live = live + 1, bytes = bytes + ? '
                'WHERE seg = ?', (length, number))

    def stranded(self, k):
        """Key of a dropped segment that has live blocks, or None.

        There is none if k is the end of the log.  Nor can what was in a
        dropped one be revived from there on, so that is forgotten; before,
        a copy of it that is gone by now could be.
        """
        self.fresh = False
        self.db.execute('DELETE FROM kept WHERE ? = (SELECT k FROM meta) AND '
                        'seg IN (SELECT seg FROM segments WHERE dropped)',
                        (k,))
        found = self.db.execute(
            'SELECT key FROM segments, meta WHERE meta.k = ? AND dropped '
            'AND live AND NOT EXISTS (SELECT 1 FROM lost) LIMIT 1', (k,)
            ).fetchone()
        return found and found[0]

    def _add_blocks(self, number, table, dead):
        """(blocks, bytes) that there are more than before."""
        rows = sorted((name, number, offset, length, cls)
                      for i, (name, cls, offset, length, _)
                      in enumerate(ROW.iter_unpack(table))
                      if cls in BLOCK_CLASSES and not (dead and bit(dead, i)))
        count = max(0, self.db.executemany(
            'INSERT OR IGNORE INTO blocks VALUES (?, ?, ?, ?, ?)',
            rows).rowcount)
        if self.db.execute('SELECT 1 FROM kept LIMIT 1').fetchone():
            self.db.executemany('DELETE FROM kept WHERE name = ?',
                                [row[:1] for row in rows])
        size = sum(row[3] for row in rows)
        if count == len(rows):
            self.db.execute('UPDATE segments SET live = live + ?, '
                            'bytes = bytes + ? WHERE seg = ?',
                            (count, size, number))
            return count, size
        return self._mend_blocks(number, rows)

    def _mend_blocks(self, number, rows):
        """_add_blocks() where some are live: these copies stand in for what
        could not be read.
        """
        count = size = 0
        for row in rows:
            place = self.db.execute('SELECT seg, offset FROM blocks '
                                    'WHERE name = ?', row[:1]).fetchone()
            if place == row[1:3]:
                self._count_block(number, 1, row[3])
                count, size = count + 1, size + row[3]
            else:
                size += row[3] - self._replace_block(*row)
        return count, size

    def _replace_block(self, name, number, offset, length, cls):
        """Have the live copy of a block here; the stored length it had."""
        old = self.db.execute('SELECT seg, length FROM blocks '
                              'WHERE name = ?', (name,)).fetchone()
        if old:
            self._count_block(old[0], -1, -old[1])
        self.db.execute('INSERT OR REPLACE INTO blocks VALUES '
                        '(?, ?, ?, ?, ?)', (name, number, offset, length,
                                            cls))
        self._count_block(number, 1, length)
        return old[1] if old else 0

    def _count_block(self, number, count, size):
        self.db.execute('UPDATE segments SET live = live + ?, '
                        'bytes = bytes + ? WHERE seg = ?',
                        (count, size, number))

    def adopt(self, segment):
        """Have the blocks of a Segment that no log entry names as far as can
        be read.  Whether they are live is not known.
        """
        self.db.execute('BEGIN IMMEDIATE')
        try:
            number = self._add_segment(
                self.state().k, segment.table, segment.key, segment.size,
                segment.table_hash, segment.count)
            self.db.executemany(
                'INSERT OR IGNORE INTO blocks VALUES (?, ?, ?, ?, ?)',
                [(name, number, offset, length, cls)
                 for name, cls, offset, length, _
                 in ROW.iter_unpack(segment.table) if cls in BLOCK_CLASSES])
            self.db.execute('COMMIT')
        except BaseException:
            rollback(self.db)
            raise

    def _remove_blocks(self, names, when):
        count = size = 0
        for name in sorted(names):
            row = self.db.execute('SELECT seg, length FROM blocks '
                                  'WHERE name = ?', (name,)).fetchone()
            if row is None:
                continue        # the totals will not add up
            count, size = count + 1, size + row[1]
            self.db.execute('INSERT INTO kept SELECT *, ? FROM blocks '
                            'WHERE name = ?', (when, name))
            self.db.execute('DELETE FROM blocks WHERE name = ?', (name,))
            self.db.execute('UPDATE segments SET live = live - 1, '
                            'bytes = bytes - ? WHERE seg = ?', row[::-1])
        return count, size

    def _remove_all(self, when):
        self.db.execute('INSERT INTO kept SELECT *, ? FROM blocks', (when,))
        self.db.execute('DELETE FROM blocks')
        self.db.execute('DELETE FROM archives')
        self.db.execute('UPDATE segments SET live = 0, bytes = 0')
        return 0, 0

    def _erase(self, entry):
        """Forget what there was, also that some of it was lost."""
        for table in ('blocks', 'kept', 'archives', 'segments'):
            self.db.execute('DELETE FROM ' + table)
        self.db.execute("DELETE FROM lost WHERE key NOT LIKE 'log/%'")
        self.db.execute('INSERT INTO erased VALUES (?, ?, ?)',
                        (entry.k, entry.time, entry.erased))
        return 0, 0

    def _revive_blocks(self, names):
        count = size = 0
        for name in names:
            row = self.db.execute(
                'SELECT name, seg, offset, length, class FROM kept '
                'WHERE name = ?', (name,)).fetchone()
            if row is None:
                continue        # the totals will not add up
            count, size = count + 1, size + row[3]
            self.db.execute('INSERT INTO blocks VALUES (?, ?, ?, ?, ?)', row)
            self.db.execute('DELETE FROM kept WHERE name = ?', (name,))
            self.db.execute('UPDATE segments SET live = live + 1, '
                            'bytes = bytes + ? WHERE seg = ?',
                            (row[3], row[1]))
        return count, size

    def _move_archives(self, entry, commit):
        if commit is None:
            return
        self.db.executemany('DELETE FROM archives WHERE id = ?',
                            [(x[0],) for x in commit.unlinked])
        # OR REPLACE: what unlinked one may be lost.
        self.db.executemany(
            'INSERT OR REPLACE INTO archives VALUES (?, ?, ?, ?, ?)',
            [x + (entry.time,) for x in commit.linked])


def entries_split(entries):
    """(some, rest) of log entries: those that are applied at once."""
    rows = 0
    for i, entry in enumerate(entries):
        rows += sum(segment[3] for segment in entry.segments)
        if rows >= LIMIT['rows at once']:
            return entries[:i + 1], entries[i + 1:]
    return entries, []


def catch_up(machine):
    """Steps: bring the index of `machine` to the end of its log; State.

    What of the log cannot be read is passed over: see State.lost.  At the
    latest every five seconds the client hears that it is worked on.
    """
    state = yield ('index', machine, 'state')
    heard = yield ('now',)
    ahead, start, most, holes = Ahead(), state.k, 1, []
    k, previous, entries, end = state.k, state.log_hash, [], None
    while True:
        if not entries:
            entries, error = yield from log_entries(machine, k + 1, previous,
                                                    most)
            # Most times there is nothing, and asking costs money on S3.
            most = min(2 * most, 256) if len(entries) == most else 1
            if not entries and (state.fresh or type(error) is not NoObject):
                entries, lost = yield from log_beyond(
                    machine, k + 1, previous, error)
                holes += lost
                if not entries and type(error) is not NoObject:
                    end = error
        if not entries:
            break
        some, entries = entries_split(entries)
        batch = yield from log_load(machine, some, ahead)
        batch[0].follow(k, holes)
        state = yield from index_apply(machine, batch)
        if state.k != some[-1].k:       # another process is at it
            entries = []
        k, previous = state.k, state.log_hash
        now = yield ('now',)
        if now >= heard + 5:
            heard = now
            yield ('answer', BUSY, U64.pack(state.k) + U64.pack(0))
    if end:
        if not isinstance(end, LOST):
            raise end
        end = '%s: %s' % (log_key(machine, k + 1), end.reason)
    if any(key.startswith('log/') for key, _ in holes):
        yield from index_adopt(machine)
    return (yield from catch_up_end(machine, state, start, end))


def catch_up_end(machine, state, start, lost):
    """Steps: `state` at the end of the log, or before an entry that is `lost`,
    in words.
    """
    if state.fresh or state.k > start:
        key = yield ('index', machine, 'stranded', state.k)
        if key:
            lost = '%s: was dropped with live blocks' % key
    return state._replace(lost=state.lost or lost)


def index_apply(machine, batch):
    """Steps: apply Loaded entries; State.  One that contradicts what the
    index knows counts as lost: nothing is written on top of it.
    """
    try:
        return (yield ('index', machine, 'apply', batch))
    except Damaged:
        pass
    for loaded in batch:
        try:
            state = yield ('index', machine, 'apply', [loaded])
        except Damaged as e:
            loaded.lost.append((log_key(machine, loaded.entry.k), e.reason))
            state = yield ('index', machine, 'apply', [loaded])
    return state


def index_adopt(machine):
    """Steps: have the blocks of all segments that no log entry names, as one
    that is lost may have named them.
    """
    prefix = 'seg/%016x/' % machine
    known = dict((yield ('index', machine, 'segments_of', prefix)))
    for key in (yield ('list', prefix)):
        if key not in known:
            try:
                segment = yield from segment_load(key)
            except LOST:
                segment = Segment(key, 0, (yield from segment_scan(key)))
            yield ('index', machine, 'adopt', segment)


##############################################################################
# History
#
# The rules a commit must pass (tarsnap-protocol(7), "COMMIT").  Pure: looks at
# an index, changes nothing.
##############################################################################


class Change:
    """What a commit claims and what its transaction really holds."""

    __slots__ = ('commit', 'lineage', 'spool', 'deleted', 'revived',
                 'rotten')

    def __init__(self, commit, lineage=b'', spool=None, revived=None,
                 rotten=frozenset()):
        self.commit = commit
        self.lineage = lineage          # of the transaction
        self.spool = spool              # its Spool, or None if it needs none
        self.deleted = spool.deleted if spool else Listed()
        self.revived = revived or {}    # {name: (class, stored length)}
        self.rotten = rotten            # names whose live copy is damaged

    def tables(self):
        """Of all its segments, one by one."""
        return self.spool.tables() if self.spool else ()

    def puts(self):
        """As linked_puts."""
        return self.spool.puts() if self.spool else ()


class Verdict:
    """What the log entry of a good commit must say."""

    __slots__ = ('dead', 'blocks', 'bytes')

    def __init__(self, dead, blocks, size):
        self.dead = dead                # bitmap for each segment
        self.blocks = blocks            # live after it
        self.bytes = size


def live_digest(rows):
    """The digest `live` of (archive id, record, state), in any order."""
    return sha256(b''.join(a + record + bytes([state])
                           for a, record, state in sorted(rows)))


def history_check(index, state, change):
    """The Verdict on a change to `index`, which stands at `state`.

    Signature and base have been looked at.  Refused with the typed error of
    the first rule it breaks.
    """
    commit = change.commit
    if commit.kind in (KIND_NUKE, KIND_ABORT):
        check_empty(commit)
    if commit.kind == KIND_NUKE:
        check_live(commit, [])
        return Verdict([], 0, 0)
    check_deletes(index, change)
    archives = check_archives(index, change)
    if commit.kind == KIND_UNDELETE:
        verdict = check_revived(index, state, change)
    else:
        verdict = check_puts(index, state, change)
    check_records(index, change, archives)
    check_live(commit, [(a, row[0], row[2]) for a, row in archives.items()])
    return verdict


def check_empty(commit):
    """An abort or a nuke lists nothing."""
    deletes = ((ALL_DELETED, ZERO32) if commit.kind == KIND_NUKE
               else (0, DIGEST_OF_NONE))
    if commit.linked or commit.unlinked:
        raise Refused(E_BAD, 'a commit of this kind lists no archives')
    if commit.puts != (0, DIGEST_OF_NONE) or commit.deletes != deletes:
        raise Refused(E_MISMATCH, 'a commit of this kind lists no blocks')


def check_deletes(index, change):
    """Rule 3 for deletes: as listed, and every one of them live."""
    digest, live = hashlib.sha256(), True
    for names in change.deleted.parts():
        digest.update(b''.join(names))
        live = live and len(index.live(names)) == len(names)
    if change.commit.deletes != (len(change.deleted), digest.digest()):
        raise Refused(E_MISMATCH, 'deleted names are not those received: '
                      '%d here' % len(change.deleted))
    if not live:
        raise Refused(E_MISMATCH, 'a deleted block is not live')
    if change.deleted and change.commit.kind == KIND_UNDELETE or (
            change.revived and change.commit.kind != KIND_UNDELETE):
        raise Refused(E_BAD, 'a commit of this kind does not list these')


def check_archives(index, change):
    """Rule 4; the live archives after it, {id: (record, lineage, state)}."""
    commit = change.commit
    archives = {row[0]: row[1:4] for row in index.archives()}
    linked = {x[0]: x for x in commit.linked}
    if len(linked) != len(commit.linked) or (
            commit.linked and commit.kind == KIND_DELETE):
        raise Refused(E_BAD, 'archives linked twice, or by a delete')
    if commit.unlinked and commit.kind == KIND_UNDELETE:
        raise Refused(E_BAD, 'archives unlinked by an undelete')
    for archive, record in commit.unlinked:
        found = archives.pop(archive, None)
        if found is None or found[0] != record:
            raise Refused(E_NOARCHIVE, 'no such archive to unlink')
        if commit.kind == KIND_WRITE:
            check_unlink(found, linked.get(archive), change.lineage)
    for archive, record, lineage, archive_state in commit.linked:
        if archive in archives:
            raise Refused(E_EXISTS, 'an archive of this name exists')
        if archive_state not in (OPEN, PARTIAL, COMPLETE):
            raise Refused(E_BAD, 'archive in unknown state %d'
                          % archive_state)
        archives[archive] = (record, lineage, archive_state)
    return archives


def check_unlink(found, relinked, lineage):
    """What a write key may unlink: an open archive of its own lineage.

    Or it keeps one for good, by linking the same record as partial; then
    only the delete role can remove it.
    """
    record, owner, state = found
    if state == OPEN and owner == lineage:
        return
    if state == OPEN and relinked and (
            relinked[1:] == (record, owner, PARTIAL)):
        return
    raise Refused(E_NOARCHIVE, 'the write role may not unlink this archive')


def check_puts(index, state, change):
    """Rule 3 for puts, and which copies are dead on arrival.

    The first copy wins, so that no write key can replace what is stored; but
    one that this server itself found damaged is no copy.
    """
    digest, count, fresh, size = hashlib.sha256(), 0, 0, 0
    dead = [bytearray(b'\1' * (len(table) // ROW.size))
            for table in change.tables()]
    seen = Listed(change.spool and change.spool.stem + '.seen')
    try:
        for part in runs(enumerate(change.puts())):
            names = [put[2] for _, put in part]
            digest.update(b''.join(names))
            count += len(part)
            live = index.live(names) if state.blocks else set()
            damaged = index.lengths(live & change.rotten)
            for t, i, name, _, length in first_copies(
                    seen, live - damaged.keys(), part):
                dead[t][i] = 0
                fresh += name not in damaged
                size += length - damaged.get(name, (0, 0))[1]
    finally:
        seen.close()
    if change.commit.puts != (count, digest.digest()):
        raise Refused(E_MISMATCH, 'blocks put are not those received: '
                      '%d here' % count)
    gone = sum(x[1] for names in change.deleted.parts()
               for x in index.lengths(names).values())
    return Verdict([bitmap_of(flags) for flags in dead],
                   state.blocks + fresh - len(change.deleted),
                   state.bytes + size - gone)


def first_copies(seen, live, puts):
    """Those of numbered `puts` whose block is neither in `live` nor in
    `seen`, to which they are added: of several copies the first wins.
    """
    puts = [(at, put) for at, put in puts if put[2] not in live]
    new = seen.add([(put[2], at) for at, put in puts], True)
    return [put for at, put in puts
            if new == len(puts) or seen.get(put[2]) == at]


def runs(items):
    """An iterator's items in lists of a few thousand."""
    items = iter(items)
    while True:
        part = list(itertools.islice(items, 4096))
        if not part:
            return
        yield part


def check_revived(index, state, change):
    """Rule 3 for what an undelete brings back: it is still kept."""
    names = list(change.revived)
    if change.commit.puts != (len(names), sha256(b''.join(names))):
        raise Refused(E_MISMATCH, 'names revived are not those received: '
                      '%d here' % len(names))
    if index.kept(names) != change.revived:
        raise Refused(E_NOBLOCK, 'a block to revive is not kept any more')
    dead = [bitmap_of([1] * (len(table) // ROW.size))
            for table in change.tables()]
    return Verdict(dead, state.blocks + len(names),
                   state.bytes + sum(x[1] for x in change.revived.values()))


def check_records(index, change, archives):
    """No archive may be left without its record.

    The server cannot see what else an archive needs; this much it can.
    """
    if change.deleted and any(row[0] in change.deleted
                              for row in archives.values()):
        raise Refused(E_MISMATCH, 'the record of a live archive is deleted')
    missing = {x[1] for x in change.commit.linked}
    if not missing:
        return
    for _, _, name, cls, _ in change.puts():
        if cls == RECORD:
            missing.discard(name)
    missing -= {name for name, row in change.revived.items()
                if row[0] == RECORD}
    found = index.lengths(missing)
    if any(name not in found or found[name][0] != RECORD
           for name in missing):
        raise Refused(E_NOBLOCK, 'an archive is linked to no record')


def check_live(commit, rows):
    """Rule 5."""
    if commit.live != live_digest(rows):
        raise Refused(E_MISMATCH, 'digest of live archives differs')


##############################################################################
# Accounts and machines
#
# Versioned objects: a change is a new object under the same prefix, and names
# count down so that the newest lists first.  All functions that touch the
# store are steps.  The server never learns a password when one is used: it
# keeps a verifier (RFC 5802, with scrypt for PBKDF2).  An account has an id
# for life; addresses and machines are claims, which may change hands.
##############################################################################

SCRYPT = (15, 8, 1)             # logN, r, p: 32 MiB, about 0.1 s
VERSIONS = 10 ** 12
ASK_AT_ONCE = 512               # wishes to the store
# The account that is read in place of one that is not there, and addresses
# that no account can have: its own, as long as many are, one that is claimed
# for it, and one that nobody claims.
DECOY = '0' * 16
DECOY_ADDRESS, DECOY_CLAIM, NO_CLAIM = 'decoy@example.\n', '\n', '\n\n'
# Members of objects that were made before there was a sum.
WITHOUT_SUM = {frozenset(x.split()) for x in (
    'name user keys time', 'id address created salt logN r p stored',
    'id address created closed salt logN r p stored', 'account',
    'account time')}


class Machine:
    """A registered machine: number, name, user, its four public keys, and
    what its operator allows.
    """

    __slots__ = ('number', 'name', 'user', 'keys', 'quota', 'read_only',
                 'frozen', 'delays')

    def __init__(self, number, value):
        self.number = number
        self.name = value['name']
        self.user = value['user']
        # R, W, D, N: 32 bytes each, joined
        self.keys = bytes.fromhex(value['keys'])
        self.quota = value.get('quota')         # bytes, or None
        self.read_only = value.get('read-only', False)
        self.frozen = value.get('frozen', '')   # letters of roles
        self.delays = value.get('delays', [])   # see delete_delay()

    def key(self, role):
        return self.keys[32 * (role - 1):32 * role]


DAY = 86400
MOST_DAYS = 3650


def delete_delay(delays, now):
    """Seconds for which what was deleted is kept; 0 if it need not be.

    `delays` are [time from which, days], in order.  A shorter one counts only
    when the longer one before it has passed since: else whoever can change it
    could destroy everything at once after all.
    """
    longest = 0
    for i, (_, days) in enumerate(delays):
        last = i + 1 == len(delays)
        if last or now < delays[i + 1][0] + days * DAY:
            longest = max(longest, days * DAY)
    return longest


def versioned_get(prefix):
    """Steps: the newest version under `prefix` as (version, dict) or None."""
    return (yield from versioned_newest((yield ('list', prefix))))


def versioned_newest(keys):
    """Steps: the first of the listed `keys` as (version, dict) or None."""
    if not keys:
        return None
    data = yield ('get', keys[0], 0, None)
    return versioned_number(keys[0]), versioned_decode(keys[0], data)


def versioned_number(key):
    """Which version of its prefix a key is; Damaged if of none."""
    last = key.rpartition('/')[2]
    if len(last) != 12 or not last.isdigit():
        raise Damaged('read', key, 'not the name of a version')
    return VERSIONS - 1 - int(last)


def versioned_encode(key, value):
    """The object `key` for a dict; it holds a sum over both.

    So neither a damaged byte nor two objects exchanged go unnoticed.
    """
    data = json.dumps(value, sort_keys=True).encode()
    value = dict(value, sum=sha256(key.encode() + b'\n' + data).hex())
    if all(type(one) in (str, int) for one in value.values()):
        # The same; what makes indents takes twice as long.
        quote = json.encoder.encode_basestring_ascii
        return ('{\n %s\n}\n' % ',\n '.join(
            '%s: %s' % (quote(name), quote(value[name]) if isinstance(
                value[name], str) else value[name])
            for name in sorted(value))).encode()
    return json.dumps(value, sort_keys=True, indent=1).encode() + b'\n'


def versioned_decode(key, data):
    """The dict in object `key`; Damaged if that is not what was put."""
    try:
        value = json.loads(data)
        found = value.pop('sum', None)
        if found is None and frozenset(value) in WITHOUT_SUM or (
                versioned_encode(key, value) == data):
            return value
    except (ValueError, AttributeError, TypeError):
        raise Damaged('read', key, 'not valid JSON') from None
    raise Damaged('read', key, 'checksum does not match')


def ask_many(wishes):
    """Steps: what came of wishes to the store, many at once; a NoObject may
    be among it.
    """
    if len(wishes) == 1:
        try:
            return [(yield wishes[0])]
        except NoObject as e:
            return [e]
    out = []
    for i in range(0, len(wishes), ASK_AT_ONCE):
        out += yield ('all', wishes[i:i + ASK_AT_ONCE])
    for value in out:
        if isinstance(value, StoreError) and not isinstance(value, NoObject):
            raise value
    return out


def get_many(keys):
    """Steps: the objects `keys`: data, or a NoObject."""
    return (yield from ask_many([('get', key, 0, None) for key in keys]))


def put_many(objects):
    """Steps: for each (key, data) True if it is new; durable on return."""
    return (yield from ask_many([('put', *one) for one in objects]))


def summed_get(key):
    """Steps: the dict in an object with a sum, or None if it is not there."""
    try:
        return versioned_decode(key, (yield ('get', key, 0, None)))
    except NoObject:
        return None


def versioned_put(prefix, version, value):
    """Steps: write `value` as that version; False if there is one."""
    return (yield ('put', *versioned_object(prefix, version, value)))


def versioned_object(prefix, version, value):
    """(key, data) of `value` as that version."""
    key = '%s%012d' % (prefix, VERSIONS - 1 - version)
    return key, versioned_encode(key, value)


def address_prefix(address):
    """Where claims to an address are kept; letters' case is no difference."""
    return 'address/%s/' % sha256(address.lower().encode('utf-8')).hex()


def account_prefix(ident):
    return 'account/%s/' % ident


def account_load(ident):
    """Steps: (version, account) of that id, or None."""
    return (yield from versioned_get(account_prefix(ident)))


def account_get(address):
    """Steps: (version, account) of an open account, or None.

    A claim to an address counts while the account it names has it.
    """
    claim = yield from versioned_get(address_prefix(address))
    if claim is None or not claim[1].get('account'):
        return None
    found = yield from account_load(claim[1]['account'])
    if found is None or found[1].get('closed') or \
            found[1]['address'].lower() != address.lower():
        return None
    return found


def account_made_up(address, secret):
    """What is taken for an account where there is none, always the same; its
    password is known to nobody.
    """
    def part(what, length):
        return hmac.digest(secret, what + address.lower().encode('utf-8'),
                           'sha256').hex()[:length]

    log_n, r, p = SCRYPT
    return {'id': part(b'id\0', 16), 'address': address, 'created': 0,
            'salt': part(b'salt\0', 64), 'logN': log_n, 'r': r, 'p': p,
            'stored': part(b'stored\0', 64)}


def decoys_make():
    """Steps: have there be what account_login reads for a user it does not
    find: a claim that nobody can make, to an account that has another address,
    so neither counts anywhere.  Always the same; durable on return.
    """
    log_n, r, p = SCRYPT
    yield from versioned_put(account_prefix(DECOY), 0, {
        'id': DECOY, 'address': DECOY_ADDRESS, 'created': 10 ** 9,
        'salt': ZERO32.hex(), 'logN': log_n, 'r': r, 'p': p,
        'stored': ZERO32.hex()})
    yield from versioned_put(address_prefix(DECOY_CLAIM), 0,
                             {'account': DECOY})


def account_login(address, secret):
    """Steps: (True, account) as account_get, or (False, a made up one).

    Neither what it does nor how long that takes tells which: one claim is
    looked for in vain, and one is read, and the account it names; be they
    the user's or decoys.
    """
    made_up = account_made_up(address, secret)
    own = yield ('list', address_prefix(address))
    other = yield ('list', address_prefix(NO_CLAIM if own else DECOY_CLAIM))
    _, claim = (yield from versioned_newest(own or other)) or (0, {})
    _, account = (yield from account_load(claim.get('account') or DECOY)) or (
        0, made_up)
    good = bool(own) and account['id'] == claim.get('account') and (
        not account.get('closed')
        and account['address'].lower() == address.lower())
    return good, account if good else made_up


def account_verifier(password, salt, cost=None):
    """What an account keeps of a password, as a dict of JSON values."""
    log_n, r, p = cost or SCRYPT
    key = hashlib.scrypt(password, salt=salt, n=1 << log_n, r=r, p=p,
                         maxmem=256 * MIB, dklen=32)
    stored = sha256(hmac.digest(key, b'client', 'sha256'))
    return {'salt': salt.hex(), 'logN': log_n, 'r': r, 'p': p,
            'stored': stored.hex()}


def account_right(account, password):
    """True if it is the password of an account, which may be made up."""
    verifier = account_verifier(password, bytes.fromhex(account['salt']), [
        account[name] for name in ('logN', 'r', 'p')])
    return hmac.compare_digest(verifier['stored'], account['stored'])


def account_address_check(address):
    """ServerError unless it can be an account's name."""
    if not 0 < len(address.encode('utf-8', 'surrogateescape')) < 256 or \
            not address.isprintable():
        raise ServerError('a user name has 1 to 255 printable bytes')


def account_claim(address, ident):
    """Steps: have the address name account `ident`; ServerError if another
    open account has it, or somebody else takes it now.
    """
    if (yield from account_get(address)) is not None:
        raise ServerError('user %s exists already' % address)
    prefix = address_prefix(address)
    claim = yield from versioned_get(prefix)
    created = yield from versioned_put(
        prefix, claim[0] + 1 if claim else 0, {'account': ident})
    if not created:
        raise ServerError('user %s is being made by somebody else' % address)


def account_create(address, password):
    """Steps: a new account; its id.  Durable on return.

    The account is written before the claim that makes it count, so a crash
    leaves at most one that nothing names.
    """
    account_address_check(address)
    yield from decoys_make()
    if (yield from account_get(address)) is not None:
        raise ServerError('user %s exists already' % address)
    ident = (yield ('random', 8)).hex()
    salt = yield ('random', 32)
    value = dict(account_verifier(password, salt), id=ident, address=address,
                 created=(yield ('now',)))
    yield from versioned_put(account_prefix(ident), 0, value)
    yield from account_claim(address, ident)
    return ident


def account_need(address):
    """Steps: (version, account), or ServerError."""
    found = yield from account_get(address)
    if found is None:
        raise ServerError('user %s does not exist' % address)
    return found


def account_changed(found, changes):
    """What `found`, as account_load, is after `changes`."""
    return {name: value for name, value in {**found[1], **changes}.items()
            if value is not None}


def account_write(found, **changes):
    """Steps: the next version of an account after `found`, with `changes`;
    one that is None goes.  ServerError if somebody else was faster.
    """
    value = account_changed(found, changes)
    created = yield from versioned_put(account_prefix(value['id']),
                                       found[0] + 1, value)
    if not created:
        raise ServerError('user %s is being changed by somebody else'
                          % value['address'])
    return found[0] + 1, value


def account_password(found, password):
    """Steps: give the account a new password."""
    salt = yield ('random', 32)
    return (yield from account_write(found,
                                     **account_verifier(password, salt)))


def account_move(found, address):
    """Steps: give the account another address."""
    return (yield from account_write(
        found, **(yield from account_moved(found, address))))


def account_moved(found, address):
    """Steps: the changes that give the account another address.

    The claim comes first: until the account says the same, it counts for
    nothing; the old claim counts no more after that.
    """
    account_address_check(address)
    if address.lower() != found[1]['address'].lower():
        yield from account_claim(address, found[1]['id'])
    return {'address': address, 'moves': found[1].get('moves', 0) + 1}


def account_close(address):
    """Steps: no login and no new machine from now on; machines stay."""
    found = yield from account_need(address)
    yield from account_write(found, closed=(yield ('now',)))


def account_ids():
    """Steps: ids of all accounts, also closed and unclaimed ones."""
    keys = yield ('list', 'account/')
    return sorted({key.split('/')[1] for key in keys} - {DECOY})


def account_list():
    """Steps: the open accounts, by address."""
    accounts = []
    for ident in (yield from account_ids()):
        try:
            _, account = yield from account_load(ident)
            found = yield from account_get(account['address'])
        except Damaged as e:            # it alone is not listed
            yield ('log', str(e))
            continue
        if found and found[1]['id'] == ident:
            accounts.append(account)
    return sorted(accounts, key=lambda account: account['address'])


def owner_prefix(number):
    return 'owner/%016x/' % number


def owner_get(number):
    """Steps: id of the account a machine belongs to, or None."""
    found = yield from versioned_get(owner_prefix(number))
    return found and found[1]['account']


def owned_prefix(ident):
    """Where it is told which machines an account may have: a list that is
    short, while owner/ is long and decides.
    """
    return 'owned/%s/' % ident


def owned_put(ident, number, name):
    """Steps: have owned/ tell of a machine, called `name`, that account
    `ident` has.
    """
    place = '%s%016x' % (owned_prefix(ident), number)
    yield ('put', place, versioned_encode(place, {'name': name}))


def owner_set(number, ident, name=''):
    """Steps: the machine, called `name`, belongs to account `ident` from now
    on.
    """
    yield from owned_put(ident, number, name)
    found = yield from versioned_get(owner_prefix(number))
    if found and found[1]['account'] == ident:
        return
    created = yield from versioned_put(
        owner_prefix(number), found[0] + 1 if found else 0,
        {'account': ident, 'time': (yield ('now',))})
    if not created:
        raise ServerError('machine %016x is being moved by somebody else'
                          % number)


def owned_complete():
    """Steps: have owned/ tell of all machines that somebody has, as it does
    not of those from before there was such a list.
    """
    told = set((yield ('list', 'owned/')))
    for number, ident in (yield from owner_machines()).items():
        if '%s%016x' % (owned_prefix(ident), number) not in told:
            machine = yield from machine_load(number)
            if machine:
                yield from owned_put(ident, number, machine.name)


def owned_machines(ident):
    """Steps: {machine, 16 digits: its name} of an account."""
    keys, found = (yield ('list', owned_prefix(ident))), {}
    for key in keys:
        machine = key.rpartition('/')[2]
        if (yield from owner_get(int(machine, 16))) == ident:
            found[machine] = (yield from summed_get(key))['name']
    return found


def owner_machines():
    """Steps: {machine number: account id} now."""
    newest, owners = {}, {}
    for key in (yield ('list', 'owner/')):
        newest.setdefault(key.split('/')[1], key)
    for machine, data in zip(newest, (yield from get_many(
            list(newest.values())))):
        try:
            if isinstance(data, NoObject):
                raise data
            versioned_number(newest[machine])
            owners[int(machine, 16)] = versioned_decode(
                newest[machine], data)['account']
        except Damaged as e:            # the others have theirs
            yield ('log', str(e))
    return owners


def machine_load(number):
    """Steps: the Machine of that number, or None."""
    found = yield from versioned_get('machine/%016x/' % number)
    if found is None:
        return None
    return Machine(number, found[1])


def machine_change(number, change):
    """Steps: the Machine as its new version has it; durable on return.

    `change` is called with what is kept of it, a dict of JSON values, and
    alters that.  ServerError if there is no such machine.
    """
    while True:
        found = yield from versioned_get('machine/%016x/' % number)
        if found is None:
            raise ServerError('there is no machine %016x' % number)
        version, value = found
        change(value)
        if (yield from versioned_put('machine/%016x/' % number, version + 1,
                                     value)):
            return Machine(number, value)


def machine_set(number, **changes):
    """Steps: change what is kept of a machine; what is None goes."""
    def change(value):
        value.update({name.replace('_', '-'): x
                      for name, x in changes.items()})
        for name in [name for name, x in value.items() if x is None]:
            del value[name]

    yield from machine_change(number, change)


def machine_delay(number, days):
    """Steps: what the machine deletes is kept for `days` from now on."""
    now = yield ('now',)

    def change(value):
        delays = value.get('delays', []) + [[now, days]]
        # What counts no more can go, but for the one in force.
        while len(delays) > 1 and (
                now >= delays[1][0] + delays[0][1] * DAY):
            del delays[0]
        value['delays'] = delays

    return (yield from machine_change(number, change))


def machine_freeze(number, roles, frozen):
    """Steps: take roles (letters) from a machine, or give them back."""
    def change(value):
        have = set(value.get('frozen', ''))
        have = have | set(roles) if frozen else have - set(roles)
        value['frozen'] = ''.join(x for x in 'rwdn' if x in have)

    return (yield from machine_change(number, change))


def machine_held(number):
    """Steps: bytes of a machine's live blocks, and of all that arrived and is
    not committed.
    """
    state = yield from catch_up(number)
    prefix, size = 'seg/%016x/' % number, state.bytes
    known = dict((yield ('index', number, 'segments_of', prefix)))
    for key in (yield ('list', prefix)):
        if key not in known and extract_key(key):
            size += (yield ('size', key)) or 0
    return size + (yield ('spool', None, 'held', number))


Quota = collections.namedtuple('Quota', 'whose most used')  # bytes


def quotas(machine):
    """Steps: the Quotas that a write of a Machine is under."""
    found = []
    owner = yield from owner_get(machine.number)
    if machine.quota is not None:
        found.append(Quota('machine', machine.quota, (
            yield from machine_held(machine.number))))
    account = (yield from account_load(owner)) if owner else None
    if account and account[1].get('quota') is not None:
        used = 0
        for number, ident in (yield from owner_machines()).items():
            if ident == owner:
                used += yield from machine_held(number)
        found.append(Quota('account', account[1]['quota'], used))
    return found


def quota_refusal(quota, size):
    """The Refused for `size` bytes more than `quota` has room for."""
    return Refused(E_QUOTA, 'quota of the %s is %d bytes, %d are used, and '
                   'this takes %d more' % (quota.whose, quota.most,
                                           quota.used, size))


def machine_numbers():
    """Steps: the numbers of all machines."""
    keys = yield ('list', 'machine/')
    return sorted({int(key.split('/')[1], 16) for key in keys})


def number_decode(key, data):
    """The machine number in object keys/HASH."""
    try:
        number = int(data, 16)
    except ValueError:
        number = -1
    if data != b'%016x' % number:
        raise Damaged('read', key, 'not a machine number')
    return number


def store_id_decode(data):
    """The 16 bytes in object store-id."""
    if len(data) != 33 or data[32:] != b'\n' or (
            set(data[:32]) - set(b'0123456789abcdef')):
        raise Damaged('read', 'store-id', 'not a store id')
    return bytes.fromhex(data[:32].decode())


def machine_create(user, name, keys, days=0):
    """Steps: the number of the machine with these keys, made if needed.

    The number is decided by the object under the keys' hash; a second try
    after a crash finds it there and completes the rest.  A new machine has a
    delete delay of `days`.
    """
    place = 'keys/' + sha256(keys).hex()
    while True:
        try:
            number = number_decode(place, (yield ('get', place, 0, None)))
            break
        except NoObject:
            pass
        number = U64.unpack((yield ('random', 8)))[0]
        prefix = 'machine/%016x/' % number
        if number and not (yield ('list', prefix)):
            yield ('put', place, b'%016x' % number)
    now = yield ('now',)
    value = {'name': name, 'user': user, 'keys': keys.hex(), 'time': now}
    if days:
        value['delays'] = [[now, days]]
    yield from versioned_put('machine/%016x/' % number, 0, value)
    machine = yield from machine_load(number)
    if machine.keys != keys:
        raise Damaged('read', place, 'names a machine with other keys')
    found = (yield from account_get(user)) if user else None
    if found and not (yield ('list', owner_prefix(number))):
        yield from owner_set(number, found[1]['id'], name)
    return number


def login_check(stored, transcript, proof):
    """True if `proof` was made by who knows the password behind `stored`."""
    mask = hmac.digest(stored, transcript, 'sha256')
    client = bytes(a ^ b for a, b in zip(proof, mask))
    return hmac.compare_digest(sha256(client), stored)


##############################################################################
# Mail: queue
#
# Mail that is to go out lies among the accounts, whoever has to send it, so
# that no page and no session waits for a mail server.  All are steps.
#
#     mail/due/NAME             what to say to whom; deleted at the end
#     mail/try/NAME.0000        attempt 1 begins; .0001 what came of it;
#                               .0002 attempt 2 begins ...
#     mail/done/ACCOUNT/NAME    it was sent, or never will be; stays
#
# NAME is a hash of what the mail is about, a key that the caller makes of
# facts: the same step of the same account has the same name whenever and
# however often it is queued, and done/ tells that it was sent.  An attempt is
# put if absent before it is made, so of several senders one makes it; one
# that is killed in between leaves a mail that goes out again after a while,
# with the same Message-ID.
##############################################################################

MAIL_FIRST = 900                # seconds after the first attempt; then double
MAIL_LONGEST = 4 * 3600
MAIL_TRIES = 34                 # which take five days; then it is given up
MAIL_SKEW = 300                 # between the clocks of two senders
MAIL_NEEDS = 3600               # after that what it tells of will not be done

MAIL_LINES = ('text', 'machines')

# Texts of mails, by kind.  A file SRV/mail/KIND stands for one of these.
# $address, $service and $url are known in all of them.
MAIL_TEXTS = {
    'confirm-address': '''\
Subject: Confirm your address for $service

Somebody, probably you, asked $service to use the address

    $address

If it was you, follow this link before $until:

    $link

If it was not, do nothing, and nothing happens.
''',
    'have-account': '''\
Subject: You have an account for $service

Somebody, probably you, asked $service for an account for

    $address

There is one already.  If its password is lost, ask for a new one:

    $forgot

If it was not you, do nothing, and nothing happens.
''',
    'reset-password': '''\
Subject: A new password for $service

Somebody, probably you, asked for a new password for the account

    $address

Choose one here before $until:

    $link

The link works once.  If it was not you, do nothing: the password stays as
it is.
''',
    'password-changed': '''\
Subject: Your password for $service was changed

The password of the account $address was changed on $date.

If you did not do that, answer this mail at once.
''',
    'address-changed': '''\
Subject: Your address for $service was changed

Since $date your account has the address

    $new

and no more this one, $old.

If you did not do that, answer this mail at once.
''',
    'warned': '''\
Subject: $service: your balance lasts until $empty

The balance of the account $address was $balance on $date.

It pays what you store for $days days, until $empty.
After that nothing can be stored or restored until you add money.  Deleting
stays possible.
$url''',
    'negative': '''\
Subject: $service: your balance is used up

The balance of the account $address has been below zero since
$since; on $date it was $balance.

Until you add money nothing can be stored or restored; deleting stays
possible.  From $deletable on what you store may be deleted.
$url''',
    'deletable': '''\
Subject: $service: your backups may be deleted now

The balance of the account $address has been below zero since
$since; on $date it was $balance.

What you store may be deleted from now on, without another mail.  Add money
if you want to keep it; if you cannot, answer this mail.
$url''',
    'reinstated': '''\
Subject: $service: your account works again

On $date the balance of the account $address is $balance.

Storing and restoring work again.
$url''',
    'erased': '''\
Subject: $service: backups of yours were deleted

All that these machines of the account $address stored was
deleted for good:

$machines

Nobody can bring it back.  The keys of these machines are of no use any more;
your account and its other machines are as they were, and you may register new
machines.
''',
    'receipt': '''\
Subject: $service: we received $amount

On $date we received $amount for the account $address,
reference $reference.

The balance is now $balance.
$url''',
    'announce': '''\
Subject: $subject

$text

--
You get this because you asked for news of $service.  To get no more of it:
$leave
''',
}


def mail_address(text):
    """True if mail can be sent there: ASCII, and nothing that could end a
    header or be taken for an option.
    """
    import re
    local, _, domain = text.rpartition('@')
    word = r'[A-Za-z0-9!#$%&\'*+/=?^_`{|}~][A-Za-z0-9!#$%&\'*+/=?^_`{|}~-]*'
    label = r'[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?'
    return (len(local) <= 64 and len(text) <= 254
            and bool(re.fullmatch(r'%s(\.%s)*' % (word, word), local))
            and bool(re.fullmatch(r'%s(\.%s)*' % (label, label), domain)))


def mail_words(text):
    """The $names in a text."""
    import re
    return set(re.findall(r'\$([a-z]+)', text))


def mail_name(kind, key):
    """The name of a mail, from its kind and what it is about."""
    return sha256(('%s\0%s' % (kind, key)).encode('utf-8')).hex()[:32]


# A mail to be queued.  `kind` is one of MAIL_TEXTS, `values` are strings for
# its words, `ident` the account it is about, '-' if none.  `key` names the
# step within the kind, such as 'ACCOUNT/DAY'.  At time `until` it is of no use
# any more.  With `needs`, a key and a SHA-256, it goes out only if that object
# is there, and is that one.
Mail = collections.namedtuple('Mail', 'kind to key values ident until needs',
                              defaults=('-', None, None))


def mail_put(*mail, **more):
    """Steps: queue a Mail; durable on return.  False if it was queued before.
    """
    mail = Mail(*mail, **more)
    if not mail_address(mail.to):
        raise ServerError('%s is not a mail address' % ascii(mail.to)[1:-1])
    return bool((yield from mails_put([mail])))


def mails_put(mails):
    """Steps: queue those Mails that were not queued before, and return them;
    durable on return.
    """
    mails = yield from mails_new(mails)
    now, objects = (yield ('now',)), []
    for mail in mails:
        assert mail_words(MAIL_TEXTS[mail.kind]) <= {
            'address', 'service', 'url', *mail.values}, mail
        place = 'mail/due/' + mail_name(mail.kind, mail.key)
        value = {'kind': mail.kind, 'to': mail.to, 'account': mail.ident,
                 'values': mail.values, 'time': now, 'until': mail.until}
        if mail.needs:
            value['needs'] = mail.needs
        objects.append((place, versioned_encode(place, value)))
    made = yield from put_many(objects)
    return [mail for mail, new in zip(mails, made) if new]


def mails_new(mails):
    """Steps: those Mails that were not sent."""
    sizes = yield from ask_many([
        ('size', 'mail/done/%s/%s' % (
            mail.ident, mail_name(mail.kind, mail.key))) for mail in mails])
    return [mail for mail, size in zip(mails, sizes) if size is None]


def mail_account(post, account, kind, key, values, until=None, needs=None):
    """Steps: queue a mail to an account, as mail_put.

    False, and nothing done, where there is no mail (`post` is None) or the
    account's name is no mail address.
    """
    if post is None or not mail_address(account['address']):
        return False
    return (yield from mail_put(kind, account['address'], key, values,
                                account['id'], until, needs))


def mail_true(mail):
    """Steps: whether what a mail tells of was done; None if it still may be.
    """
    if 'needs' not in mail:
        return True
    key, digest = mail['needs']
    try:
        data = yield ('get', key, 0, None)
    except NoObject:
        late = mail['time'] + MAIL_NEEDS
        return None if (yield ('now',)) < late else False
    return sha256(data).hex() == digest


def mail_tries(name):
    """Steps: (attempts so far, what is known of the last, time of the next).

    The next one is at 0 if the first is to be made.
    """
    keys = yield ('list', 'mail/try/%s.' % name)
    last = (yield from summed_get(keys[-1])) if keys else None
    if last is None:
        return 0, {}, 0
    tries = int(keys[-1].rpartition('.')[2]) // 2 + 1
    wait = min(MAIL_LONGEST, MAIL_FIRST << min(tries - 1, 10))
    return tries, last, last['time'] + wait


def mail_ready(name):
    """Steps: the number of the attempt that it is time for, or None."""
    now = yield ('now',)
    tries, last, due = yield from mail_tries(name)
    # A clock that was set back does not hold mail up.
    if now < due and now > last['time'] - MAIL_SKEW:
        return None
    return tries


def mail_claim(name, mail, tries):
    """Steps: True if attempt `tries`, from 0, is ours to make."""
    place = 'mail/try/%s.%04d' % (name, 2 * tries)
    if not (yield ('put', place, versioned_encode(place, {
            'time': (yield ('now',))}))):
        return False
    done = 'mail/done/%s/%s' % (mail['account'], name)
    if (yield ('size', done)) is None:
        return True
    yield from mail_clear(name)         # who sent it got no further
    return False


def mail_later(name, tries, reason):
    """Steps: an attempt came to nothing yet."""
    place = 'mail/try/%s.%04d' % (name, 2 * tries + 1)
    yield ('put', place, versioned_encode(place, {
        'time': (yield ('now',)), 'reason': reason}))


def mail_end(name, mail, failed=None):
    """Steps: the mail was sent, or why it never will be."""
    place = 'mail/done/%s/%s' % (mail['account'], name)
    value = {'kind': mail['kind'], 'to': mail['to'],
             'account': mail['account'], 'queued': mail['time'],
             'time': (yield ('now',))}
    if failed:
        value['failed'] = failed
    yield ('put', place, versioned_encode(place, value))
    yield from mail_clear(name)


def mail_clear(name):
    """Steps: forget a mail that is done; the name of it last."""
    for key in (yield ('list', 'mail/try/%s.' % name)):
        yield ('delete', key)
    yield ('delete', 'mail/due/' + name)


def mail_list():
    """Steps: all mails, [(name, mail, done)], the oldest first.

    Of one that is done only what mail_end keeps is known.
    """
    found = []
    for key in (yield ('list', 'mail/')):
        where, name = key.split('/')[1], key.rpartition('/')[2]
        if where != 'try':
            mail = yield from summed_get(key)
            if mail:
                found.append((name, mail, where == 'done'))
    return sorted(found, key=lambda one: (
        one[1].get('queued', one[1]['time']), one[0]))


##############################################################################
# Links
#
# What the owner of an account may do without the operator: links in mails,
# signed with a key that lies among the accounts, which end by themselves and
# work once.  Nothing is kept of a link: it names the state of the account, or
# of the claim to an address, in which it was made, and using it changes that.
# Looking at one changes nothing, as programs that read mail look at all.  All
# are steps.
##############################################################################

LINK_SECONDS = {'join': 3 * DAY, 'move': DAY, 'reset': 2 * 3600,
                'leave': 365 * DAY}
LINK_EACH = 900                 # seconds; one mail of a kind in so many
LINK_BAD = 'this link is not good any more; ask for another one'


def link_key():
    """Steps: what links are signed with; made when first needed."""
    place = 'link/key'
    while True:
        value = yield from summed_get(place)
        if value is not None:
            return bytes.fromhex(value['key'])
        key = yield ('random', 32)
        yield ('put', place, versioned_encode(place, {'key': key.hex()}))


def link_state(account):
    """What a link to an open account is good for: its password and address.
    """
    return sha256(json.dumps([account[name] for name in (
        'id', 'salt', 'address')] + [account.get('moves', 0)]).encode()
    ).hex()[:16]


def link_claims(address):
    """Steps: as link_state, for an address that no account has."""
    claim = yield from versioned_get(address_prefix(address))
    return '%d' % (claim[0] + 1 if claim else 0)


def link_token(data):
    """Steps: what stands in a link that says `data`, signed."""
    signature = hmac.digest((yield from link_key()), b'link\0' + data,
                            'sha256')
    return '.'.join(base64.urlsafe_b64encode(part).decode().rstrip('=')
                    for part in (data, signature))


def link_make(post, what):
    """Steps: (link that says `what`, a dict; the time it ends)."""
    if post is None or not post.url:
        raise ServerError('links need mail-from and web-url in '
                          'tarsnapd.conf')
    until = (yield ('now',)) + LINK_SECONDS[what['kind']]
    data = json.dumps(dict(what, until=until), sort_keys=True).encode()
    token = yield from link_token(data)
    return '%s?link=%s' % (post.url, token), until


def link_mail(post, what, to, ident='-'):
    """Steps: mail the link that says `what`; False if one like it was mailed
    a moment ago.
    """
    link, until = yield from link_make(post, what)
    key = json.dumps([ident, what, (yield ('now',)) // LINK_EACH],
                     sort_keys=True)
    kind = 'reset-password' if what['kind'] == 'reset' else 'confirm-address'
    return (yield from mail_put(kind, to, key, {
        'link': link, 'until': moment(until)}, ident, until))


def link_join(post, address):
    """Steps: whoever reads mail to `address` may make an account of it.

    False, and nothing happens, if there is one, or a link was mailed a moment
    ago.  Who asks over the web must not learn which it was.
    """
    if not mail_address(address):
        raise ServerError('%s is not a mail address' % ascii(address)[1:-1])
    if (yield from account_get(address)) is None:
        state = yield from link_claims(address)
        return (yield from link_mail(post, {
            'kind': 'join', 'address': address, 'state': state}, address))
    return False


def link_reset(post, address):
    """Steps: whoever reads mail to the account may give it a password.

    False, and nothing happens, if there is none, or a link was mailed a
    moment ago.  Who asks over the web must not learn which it was.
    """
    found = yield from account_get(address)
    if found and mail_address(found[1]['address']):
        account = found[1]
        return (yield from link_mail(
            post, {'kind': 'reset', 'account': account['id'],
                   'state': link_state(account)},
            account['address'], account['id']))
    return False


def link_move(post, found, address):
    """Steps: the account gets another address once that is confirmed; False
    if a link was mailed a moment ago.
    """
    if not mail_address(address):
        raise ServerError('%s is not a mail address' % ascii(address)[1:-1])
    account = found[1]
    return (yield from link_mail(
        post, {'kind': 'move', 'account': account['id'],
               'state': link_state(account), 'address': address},
        address, account['id']))


def ask_put(kind, address, ident=''):
    """Steps: note that somebody wants a link; durable on return.

    The account pages do no more, whether there is such an account or not:
    who asks cannot tell by the work it is.  asks_answer() does the rest.
    """
    place = 'ask/' + mail_name(kind, '%s/%s/%d' % (
        address.lower(), ident, (yield ('now',)) // LINK_EACH))
    yield ('put', place, versioned_encode(place, {
        'kind': kind, 'address': address, 'account': ident,
        'time': (yield ('now',))}))


def asks_answer(post):
    """Steps: queue the mails that were asked for."""
    for place in (yield ('list', 'ask/')):
        ask = yield from summed_get(place)
        if ask is not None:
            yield from ask_answer(post, ask)
        yield ('delete', place)


def ask_answer(post, ask):
    """Steps: queue what one asked for, if it is to be had."""
    address = ask['address']
    if not mail_address(address):
        return
    if ask['kind'] == 'reset':
        yield from link_reset(post, address)
    elif ask['kind'] == 'move':
        found = yield from account_load(ask['account'])
        if found and not found[1].get('closed'):
            yield from link_move(post, found, address)
    elif not (yield from link_join(post, address)):
        found = yield from account_get(address)
        if found:
            yield from mail_account(
                post, found[1], 'have-account', '%s/%d' % (
                    found[1]['id'], ask['time'] // LINK_EACH),
                {'forgot': post.page('forgot.cgi')})


def link_read(token):
    """Steps: (what a link says, account as account_load or None for one that
    joins).  ServerError if it is not good.  Changes nothing.
    """
    try:
        part = token.partition('.')[0]
        data = base64.b64decode(part + '=' * (-len(part) % 4), b'-_', True)
        found = token.encode('ascii')
    except ValueError:
        raise ServerError(LINK_BAD) from None
    if not hmac.compare_digest((yield from link_token(data)).encode(), found):
        raise ServerError(LINK_BAD)
    what = json.loads(data)
    found, state = None, None
    if what['kind'] == 'join':
        state = yield from link_claims(what['address'])
    else:
        found = yield from account_load(what['account'])
        if found and not found[1].get('closed'):
            state = (link_state(found[1]) if what['kind'] != 'leave'
                     else 'news')
    if state != what['state'] or (yield ('now',)) >= what['until']:
        raise ServerError(LINK_BAD)
    return what, found


def link_use(post, token, password=None):
    """Steps: do what a link says; the address of the account.

    Kinds join and reset need a password.  ServerError if the link is not
    good, also because somebody else has used it.
    """
    what, found = yield from link_read(token)
    if what['kind'] == 'join':
        yield from account_create(what['address'], password)
        return what['address']
    if what['kind'] == 'reset':
        yield from password_change(post, found, password)
        return found[1]['address']
    if what['kind'] == 'leave':
        yield from account_write(found, news=None)
        return found[1]['address']
    yield from address_change(post, found, what['address'])
    return what['address']


def news_put(post, subject, text):
    """Steps: queue an announcement to all who want news; to how many.

    Each has a link with which he gets no more.  The same one again goes to
    those only who have not had it.
    """
    digest, count = sha256(('%s\n%s' % (subject, text)).encode()).hex(), 0
    for account in (yield from account_list()):
        if account.get('news'):
            link, _ = yield from link_make(post, {
                'kind': 'leave', 'account': account['id'], 'state': 'news'})
            count += yield from mail_account(
                post, account, 'announce', '%s/%s' % (account['id'], digest),
                {'subject': subject, 'text': text, 'leave': link})
    return count


def password_change(post, found, password):
    """Steps: a new password for an account, and a mail that says so."""
    salt = yield ('random', 32)
    yield from account_tell(post, found, account_verifier(password, salt),
                            'password-changed', {})


def address_change(post, found, address):
    """Steps: another address for an account, and a mail to the old one."""
    yield from account_tell(
        post, found, (yield from account_moved(found, address)),
        'address-changed', {'old': found[1]['address'], 'new': address})


def account_tell(post, found, changes, kind, values):
    """Steps: account_write(), and a mail to the address that it had.

    The mail is queued first, and needs what is written then: it goes out if
    and only if that was, whoever is killed in between.
    """
    old = found[1]
    key, data = versioned_object(account_prefix(old['id']), found[0] + 1,
                                 account_changed(found, changes))
    digest = sha256(data).hex()
    yield from mail_account(
        post, old, kind, '%s/%d/%s' % (old['id'], found[0] + 1, digest),
        dict(values, date=moment((yield ('now',)))), needs=[key, digest])
    yield from account_write(found, **changes)


##############################################################################
# Ledger
#
# What accounts have used, paid and have left, in attodollars (10^-18 US$),
# in the store of accounts: tarsnapd(8), "THE LEDGER".  No object changes, and
# a name is a function of what it is about, never of when it was written: who
# comes second, on whatever host, finds it there and takes it.
#
#     usage/DAY/SHARD       what machines used on a day, and where in their
#                           logs it ended: made from the day before and logs
#     traffic/DAY/STREAM/K  what a process sent, a piece for each ten minutes
#     pay/ACCOUNT/...       adjust/ACCOUNT/...  money that came or went
#     closed/MONTH/SHARD    balances at the end of a month
#     standing/ACCOUNT/...  versioned: ok, warned, negative or deletable
#
# A reversal gives back what a refund or a chargeback took.
#
# A shard of usage is the first digit of a machine's number, of closings that
# of the account's id.  A machine changes hands; it never changes its shard,
# so that nobody can be charged for it twice.  The view (SQLite) is a function
# of these objects and may be thrown away.
##############################################################################

SHARDS = '0123456789abcdef'
ATTO = 10 ** 18                 # attodollars in a dollar
BILL_LATER = 600                # seconds after its end until a day is billed:
#                                 clocks of servers may differ so much
BILL_MOST = 31                  # days at once, unless told to
TRAFFIC_SECONDS = 600           # what a killed process can lose
WARN_DAYS = 7
DELETE_DAYS = 7                 # from the first day below zero

Prices = collections.namedtuple(
    'Prices', 'storage up down')        # attodollars, a byte(-month)
# A machine's day.  `k` is the last log entry that is charged with it and
# `bytes` are live after that; stored are byte-days, up and down bytes.
Used = collections.namedtuple('Used', 'account k bytes stored up down')
# `of`, of a refund, chargeback or reversal: the name of the payment, else ''.
Money = collections.namedtuple('Money', 'account kind amount time text of')
# A view: what all was for, and days of storage left or None.
Balance = collections.namedtuple('Balance', 'money held')

# Entries by where they are, and the sign of their amount.
PAID = {'payment': 1, 'refund': -1, 'chargeback': -1, 'reversal': 1}
ADJUSTED = {'credit': 1, 'adjustment': 0}


def day_text(day):
    """2026-11-22; `day` counts days since 1970, in UTC."""
    return time.strftime('%Y-%m-%d', time.gmtime(day * DAY))


def day_parse(text):
    """The number of a day; ServerError if it is none."""
    import calendar
    try:
        return calendar.timegm(time.strptime(text, '%Y-%m-%d')) // DAY
    except ValueError:
        raise ServerError('%s is not a day like 2026-11-22'
                          % printable(text)) from None


def month_days(day):
    """(first day of the month of `day`, first day of the next)."""
    import calendar
    date = time.gmtime(day * DAY)
    first = day - date.tm_mday + 1
    return first, first + calendar.monthrange(date.tm_year, date.tm_mon)[1]


def price_of_day(storage, day):
    """Attodollars for a byte on `day`, from those for a byte and month.

    Rounded down here, and nowhere else.
    """
    first, after = month_days(day)
    return storage // (after - first)


def money_parse(text, digits=18):
    """A decimal number with up to `digits` digits after the point, times
    10^digits; ServerError if it is none.
    """
    whole, _, part = text.partition('.')
    if not (whole + part).isascii() or not (whole + part).isdigit() or (
            not whole or len(part) > digits or len(whole) > 12):
        raise ServerError('%s is not an amount: digits, and up to %d behind '
                          'a point' % (printable(text), digits))
    return int(whole + part.ljust(digits, '0'))


def money_text(amount):
    """Attodollars as dollars, all 18 digits."""
    sign = '-' if amount < 0 else ''
    return '%s%d.%018d' % ((sign,) + divmod(abs(amount), ATTO))


def money_short(amount):
    """Attodollars as a person reads them: cents, rounded down."""
    cents = amount * 100 // ATTO
    sign = '-' if cents < 0 else ''
    return '%s$%d.%02d' % ((sign,) + divmod(abs(cents), 100))


def prices_conf(conf):
    """The Prices of a configuration, None if nothing is charged."""
    names = ('storage-price', 'upload-price', 'download-price')
    if not any(name in conf for name in names):
        return None
    # Picodollars: six more digits make attodollars.
    return Prices(*(money_parse(conf.get(name, '0'), 6) for name in names))


def once(key, data):
    """Steps: put `data`, if there is no such object; what is there then.

    A put that failed may have succeeded: it is tried once more.
    """
    try:
        created = yield ('put', key, data)
    except StoreError:
        created = yield ('put', key, data)
    return data if created else (yield ('get', key, 0, None))


def lines_encode(key, lines):
    """The object `key` of lines of words; the last one is a sum over all."""
    text = ''.join(' '.join(map(str, line)) + '\n' for line in lines).encode()
    return text + lines_sum(key, text)


def lines_sum(key, text):
    return b'sum %s\n' % sha256(key.encode() + b'\n' + text).hex().encode()


def lines_decode(key, data):
    """The lines in object `key`, lists of words; Damaged if altered."""
    return [line.split(' ') for line in lines_text(key, data)]


def lines_text(key, data):
    """The lines in object `key`, not yet words; Damaged if altered."""
    text = data[:-len(lines_sum('', b''))]
    if text + lines_sum(key, text) != data or not text.isascii() or (
            text and text[-1:] != b'\n'):
        raise Damaged('read', key, 'checksum does not match')
    return text.decode('ascii').split('\n')[:-1]


# Usage of a day.


class Usage:
    """usage/DAY/SHARD."""

    __slots__ = ('day', 'shard', 'prices', 'streams', 'rows')

    def __init__(self, day, shard, prices):
        self.day = day
        self.shard = shard
        self.prices = prices    # Prices, storage for a byte on this day
        self.streams = {}       # (day, stream) -> pieces that are charged
        self.rows = {}          # machine, 16 digits -> Used

    def key(self):
        return usage_key(self.day, self.shard)

    def amounts(self, machine):
        """Attodollars for (storage, up, down) of a machine; one that belongs
        to nobody is free.
        """
        row = self.rows[machine]
        if row.account == '-':
            return 0, 0, 0
        storage, up, down = self.prices
        return storage * row.stored, up * row.up, down * row.down

    def encode(self):
        lines = [('tarsnap-usage', 1), ('prices',) + tuple(self.prices)]
        lines += [('traffic', day_text(day), stream, count)
                  for (day, stream), count in sorted(self.streams.items())]
        lines += [(machine,) + tuple(row) + (sum(self.amounts(machine)),)
                  for machine, row in sorted(self.rows.items())]
        return lines_encode(self.key(), lines)


def usage_key(day, shard):
    return 'usage/%s/%s' % (day_text(day), shard)


def usage_decode(day, shard, data, account=None):
    """The Usage in object usage_key(day, shard); Damaged if it is none.  With
    an account it has rows of that only, and no pieces of traffic.
    """
    key = usage_key(day, shard)
    lines = lines_text(key, data)
    if account:
        lines[2:] = [line for line in lines[2:]
                     if line.startswith(account + ' ', 17)]
    lines = [line.split(' ') for line in lines]
    try:
        if lines[0] != ['tarsnap-usage', '1'] or lines[1][0] != 'prices':
            raise ValueError('of another kind')
        usage = Usage(day, shard, Prices(*map(int, lines[1][1:])))
        for line in lines[2:]:
            if line[0] == 'traffic':
                usage.streams[day_parse(line[1]), line[2]] = int(line[3])
                continue
            usage.rows[line[0]] = Used(line[1], *map(int, line[2:-1]))
            if sum(usage.amounts(line[0])) != int(line[-1]):
                raise ValueError('amount is not price times quantity')
    except (ValueError, TypeError, IndexError, ServerError) as e:
        raise Damaged('read', key, e) from None
    return usage


def usage_get(day, shard):
    """Steps: the Usage of a day, or None."""
    try:
        return usage_decode(day, shard, (
            yield ('get', usage_key(day, shard), 0, None)))
    except NoObject:
        return None


def log_since(places, end, most):
    """Steps: {machine: [(k, time, live bytes, uploaded bytes)]} of what the
    logs have after `places`, {machine: k}, before time `end`; of machines in
    `most` up to entry k of that.

    What cannot be read ends it, and is said; once mended it is charged with
    the day that is next then.
    """
    found = {machine: [] for machine in places}
    places = dict(places)
    while places:
        wanted = {machine: k + 1 for machine, k in places.items()
                  if k + 1 <= most.get(machine, k + 1)}
        datas = yield from get_many([log_key(int(machine, 16), k)
                                     for machine, k in wanted.items()])
        places = {}
        for (machine, k), data in zip(wanted.items(), datas):
            if isinstance(data, NoObject):
                continue
            try:
                entry = log_decode(int(machine, 16), k, data)
            except Damaged as e:
                yield ('log', 'bill: %s' % e)
                continue
            if entry.time < end or machine in most:
                found[machine].append((k, entry.time, entry.bytes,
                                       entry_uploaded(entry)))
                places[machine] = k
    return found


def entry_uploaded(entry):
    """Bytes of the segments that a client committed with a log entry."""
    if not entry.commit or commit_decode(entry.commit).kind != KIND_WRITE:
        return 0
    return sum(segment[1] for segment in entry.segments)


def stored_days(entries, held, start):
    """Byte-days of the day that begins at time `start`, rounded down, where
    `held` bytes are live then; `entries` as of log_since.
    """
    total, at = 0, start
    for _, when, after, _ in entries:
        when = min(max(when, at), start + DAY)
        total += held * (when - at)
        held, at = after, when
    return (total + held * (start + DAY - at)) // DAY


def owner_versions():
    """Steps: {machine, 16 digits: [(time from which, account id)]}, newest
    first.
    """
    keys = yield ('list', 'owner/')
    found = {}
    for key, data in zip(keys, (yield from get_many(keys))):
        if isinstance(data, NoObject):
            raise data
        value = versioned_decode(key, data)
        found.setdefault(key.split('/')[1], []).append(
            (value.get('time', 0), value['account']))
    return found


def owner_at(versions, end):
    """Whose a machine is before time `end`, '-' if nobody's."""
    for when, account in versions:
        if when < end:
            return account
    return '-'


class Billing:
    """What is the same for all shards of a day, read once."""

    __slots__ = ('start', 'machines', 'owners', 'traffic')

    def __init__(self, start, machines, owners):
        self.start = start          # first day that is billed
        self.machines = machines    # {shard: [machine, 16 digits]}
        self.owners = owners        # as of owner_versions
        self.traffic = {}           # day -> as of traffic_load

    def sent(self, day):
        """Steps: what was sent on a day."""
        if day not in self.traffic:
            self.traffic = {known: x for known, x in self.traffic.items()
                            if known >= day - 1}
            self.traffic[day] = yield from traffic_load(day)
        return self.traffic[day]


def billing_load(start):
    """Steps: a new Billing."""
    machines = {shard: [] for shard in SHARDS}
    for number in (yield from machine_numbers()):
        machines[('%016x' % number)[0]].append('%016x' % number)
    return Billing(start, machines, (yield from owner_versions()))


def usage_make(billing, day, shard, prices, before, limit=None):
    """Steps: the Usage of a shard on `day`, not written.

    `before` is that of the day before, None on the first day; what happened
    before that is nobody's charge.  `limit` is a Usage whose places in logs
    and traffic are not passed.
    """
    usage = Usage(day, shard, prices)
    start, end = day * DAY, (day + 1) * DAY
    down = yield from usage_sent(billing, usage, before, limit)
    old = before.rows if before else {}
    places = {machine: old[machine].k if machine in old else 0
              for machine in billing.machines[shard]}
    most = {machine: limit.rows[machine].k if machine in limit.rows else k
            for machine, k in places.items()} if limit else {}
    logs = yield from log_since(places, end, most)
    for machine, entries in logs.items():
        row = old.get(machine)
        k, held = (row.k, row.bytes) if row else (0, 0)
        stored = stored_days(entries, held, start)
        if entries:
            k, _, held, _ = entries[-1]
        if k or machine in down:
            usage.rows[machine] = Used(
                owner_at(billing.owners.get(machine, ()), end), k, held,
                stored, sum(up for _, when, _, up in entries
                            if before or when >= start),
                down.get(machine, 0))
    return usage


def usage_sent(billing, usage, before, limit):
    """Steps: {machine: bytes sent to it} that are charged with `usage`, which
    learns which pieces these are: those of its day, and what came late for
    the day before.
    """
    down = collections.Counter()
    for day in (usage.day - 1, usage.day) if before else (usage.day,):
        for stream, pieces in (yield from billing.sent(day)).items():
            done = before.streams.get((day, stream), 0) if before else 0
            count = len(pieces)
            if limit:
                count = min(count, limit.streams.get((day, stream), 0))
            if count:
                usage.streams[day, stream] = count
            for piece in pieces[done:count]:
                down.update(piece)
    return {machine: size for machine, size in down.items()
            if machine[0] == usage.shard}


# Traffic: what sessions send.


class Traffic:
    """What this process sent and has not written down; any thread."""

    def __init__(self):
        self.lock = threading.Lock()
        self.stream = None          # what names this process's pieces
        self.sent = {}              # machine number -> bytes
        self.day = None             # of the pieces that are being written
        self.pieces = 0             # written on that day
        self.unclear = None         # (key, object) that may be there or not
        self.last = time.monotonic()    # when it was last written

    def add(self, machine, size):
        """So many bytes of blocks go to a machine."""
        with self.lock:
            self.sent[machine] = self.sent.get(machine, 0) + size

    def due(self):
        """True if it is time to write; then not again for a while."""
        if time.monotonic() < self.last + TRAFFIC_SECONDS:
            return False
        self.last = time.monotonic()
        return bool(self.sent or self.unclear)

    def take(self, day):
        """(key, object) of the next piece, None if nothing was sent."""
        with self.lock:
            if self.unclear or not self.sent:
                return self.unclear
            sent, self.sent = self.sent, {}
            if day != self.day:
                self.day, self.pieces = day, 0
            # Not before a worker has its own process.
            self.stream = self.stream or os.urandom(8).hex()
            key = 'traffic/%s/%s/%06d' % (day_text(day), self.stream,
                                          self.pieces)
            self.pieces += 1
            self.unclear = key, lines_encode(key, [
                ('%016x' % machine, size)
                for machine, size in sorted(sent.items())])
            return self.unclear

    def written(self, piece):
        """`piece`, as take() said it, is durable."""
        with self.lock:
            if self.unclear is piece:   # else another thread was faster
                self.unclear = None


def traffic_flush(traffic):
    """Steps: write down what was sent.

    After an error the next call repeats the very same piece first.
    """
    while True:
        piece = traffic.take((yield ('now',)) // DAY)
        if piece is None:
            return
        yield from once(*piece)
        traffic.written(piece)


def traffic_load(day):
    """Steps: {stream: [{machine, 16 digits: bytes}]} of a day, in order, as
    far as none is missing.
    """
    keys = yield ('list', 'traffic/%s/' % day_text(day))
    found = {}
    for key, data in zip(keys, (yield from get_many(keys))):
        _, _, stream, number = key.split('/')
        pieces = found.setdefault(stream, [])
        if int(number) == len(pieces) and not isinstance(data, NoObject):
            pieces.append({machine: int(size) for machine, size
                           in lines_decode(key, data)})
    return found


# Money that comes and goes.


def money_name_check(name):
    """ServerError unless it can be a part of an object's key."""
    if not 0 < len(name) <= 200 or not all(
            c.isascii() and (c.isalnum() or c in '-_.') for c in name) or (
            name.strip('.') == ''):
        raise ServerError('a name has 1 to 200 letters, digits, - _ or .')


def money_put(account, place, kind, amount, text, of=''):
    """Steps: True if the entry is new; durable on return.

    `place` is its key after pay/ or adjust/ACCOUNT/, a function of what it
    is about.  ServerError if another amount has been entered under it.
    """
    sign = {**PAID, **ADJUSTED}[kind]
    assert amount and amount * sign >= 0, (kind, amount)
    money_name_check(place)
    key = '%s/%s/%s' % ('pay' if kind in PAID else 'adjust', account, place)
    value = {'kind': kind, 'amount': amount, 'text': text,
             'time': (yield ('now',))}
    if of:
        value['of'] = of
    data = versioned_encode(key, value)
    try:
        created = yield ('put', key, data)
    except StoreError:
        created = yield ('put', key, data)
    if not created:
        there = yield ('get', key, 0, None)
        found = money_decode(key, there)
        if (found.kind, found.amount, found.of) != (kind, amount, of):
            raise ServerError('%s is entered already: %s %s' % (
                place, found.kind, money_text(found.amount)))
        return there == data
    return True


def money_decode(key, data):
    """The Money in an object of pay/ or adjust/; Damaged if it is none."""
    value = versioned_decode(key, data)
    try:
        return Money(key.split('/')[1], value['kind'], value['amount'],
                     value['time'], value['text'], value.get('of', ''))
    except KeyError as e:
        raise Damaged('read', key, 'has no %s' % e) from None


def ledger_pay(account, provider, session, amount, kind='payment', text='',
               post=None, of=''):
    """Steps: enter what a provider says of a payment; True if it is new.

    `session` is the provider's own name of what happened: twice the same is
    entered once.  `amount` is in attodollars, negative for a refund or a
    chargeback, with the name PROVIDER-SESSION `of` the payment if that is
    known.  Durable on return, and access is back; the standing is for
    standing_update() to judge.  With a Post whoever paid has a receipt, one
    for each session.
    """
    assert kind in PAID, kind
    place = '%s-%s' % (provider, session)
    new = yield from money_put(account, place, kind, amount, text, of)
    if kind == 'payment':
        yield from money_receipt(post, account, place, amount, session)
    return new


def ledger_payments(account=None):
    """Steps: {key: Money} of what an account paid and got back (None: of
    all).
    """
    keys = yield ('list', 'pay/%s/' % account if account else 'pay/')
    return {key: money_decode(key, data)
            for key, data in zip(keys, (yield from get_many(keys)))
            if not isinstance(data, NoObject)}


def ledger_refund(account, payment, kind, amount=None, session=None, text=''):
    """Steps: (True if it is new, attodollars) of a refund or chargeback of
    the payment of that name, of all that was not given back if `amount` is
    None; ServerError if that is more.

    `session` is what the provider calls it; without one there is one refund
    and one chargeback of a payment.
    """
    provider, _, reference = payment.partition('-')
    session = session or '%s.%s' % (reference, kind)
    place = '%s-%s' % (provider, session)
    entries = {key.split('/')[2]: money for key, money in (
        yield from ledger_payments(account)).items()}
    paid = entries.get(payment)
    if paid is None or paid.kind != 'payment':
        raise ServerError('there is no payment %s of this account'
                          % printable(payment))
    back = -sum(money.amount for name, money in entries.items()
                if money.of == payment and name != place)
    if amount is None:
        amount = (-entries[place].amount if place in entries
                  else paid.amount - back)
    if not 0 < amount <= paid.amount - back:
        raise ServerError('%s: %s of %s dollars were given back; not %s more'
                          % (payment, money_text(back),
                             money_text(paid.amount), money_text(amount)))
    new = yield from ledger_pay(account, provider, session, -amount, kind,
                                text, of=payment)
    return new, amount


def money_receipt(post, account, place, amount, reference):
    """Steps: tell an account's owner what was received, once for a `place`,
    as in money_put.
    """
    found = (yield from account_load(account)) if post else None
    if found is None:
        return
    yield from ledger_catch_up(account)
    balance = yield ('view', 'balance', account)
    yield from mail_account(
        post, found[1], 'receipt', '%s/%s' % (account, place),
        {'amount': money_short(amount), 'reference': reference,
         'date': day_text((yield ('now',)) // DAY),
         'balance': money_short(balance.money)})


def ledger_adjust(account, key, kind, amount, reason):
    """Steps: enter a credit or an adjustment; True if it is new."""
    assert kind in ADJUSTED, kind
    return (yield from money_put(account, key, kind, amount, reason))


# Closings: what is before them need not be read again.


def month_text(day):
    return day_text(day)[:7]


def closed_key(first, shard):
    return 'closed/%s/%s' % (month_text(first), shard)


def money_digest(key):
    """What a closing says of an entry that it includes."""
    return sha256(key.encode())[:8].hex()


def closed_get(first, shard):
    """Steps: {account: (balance, set of digests)} at the end of the month
    that begins with day `first`, or None.
    """
    key = closed_key(first, shard)
    try:
        lines = lines_decode(key, (yield ('get', key, 0, None)))
    except NoObject:
        return None
    return {line[0]: (int(line[1]), set(line[2:])) for line in lines}


def month_usage(start, first, after, add, account=None):
    """Steps: call `add` with each Usage of days `first` to `after` - 1 that
    were billed, in order, of an account or of all; the last such day.
    """
    for day in range(max(first, start), after):
        keys = [usage_key(day, shard) for shard in SHARDS]
        datas = yield from get_many(keys)
        if any(isinstance(data, NoObject) for data in datas):
            return day - 1
        for shard, data in zip(SHARDS, datas):
            add(usage_decode(day, shard, data, account))
    return after - 1


class Spent:
    """What accounts spent: {account: attodollars} of the Usage added."""

    def __init__(self):
        self.of = collections.Counter()

    def add(self, usage):
        for machine, row in usage.rows.items():
            self.of[row.account] += sum(usage.amounts(machine))


def month_close(start, first, after):
    """Steps: write the closings of a month, all of whose days, `first` to
    `after` - 1, have been billed; so have the months before.

    Entries count that were made before the month's end.  `start` is the first
    day that was billed at all.
    """
    spent = Spent()
    last = yield from month_usage(start, first, after, spent.add)
    if last < after - 1:
        raise NoObject('close', 'usage/' + day_text(last + 1))
    keys = (yield ('list', 'pay/')) + (yield ('list', 'adjust/'))
    for shard in SHARDS:
        closed = {}
        if first > start:
            closed = yield from closed_get(month_days(first - 1)[0], shard)
        sums = {account: (balance, set(digests))
                for account, (balance, digests) in closed.items()}
        month_spend(sums, {account: amount for account, amount
                           in spent.of.items() if account[0] == shard})
        yield from month_add(sums, after, [
            key for key in keys if key.split('/')[1][0] == shard])
        yield from once(closed_key(first, shard), lines_encode(
            closed_key(first, shard),
            [(account, balance, *sorted(digests))
             for account, (balance, digests) in sorted(sums.items())]))


def month_spend(sums, spent):
    """Take from closing balances `sums` what accounts spent."""
    for account, amount in spent.items():
        balance, digests = sums.get(account, (0, set()))
        sums[account] = balance - amount, digests


def month_add(sums, after, keys):
    """Steps: add to closing balances `sums` what entries `keys` from before
    day `after` are not in them.
    """
    new = [key for key in keys if money_digest(key) not in sums.get(
        key.split('/')[1], (0, ()))[1]]
    for key, data in zip(new, (yield from get_many(new))):
        if isinstance(data, NoObject):
            raise data
        money = money_decode(key, data)
        if money.time < after * DAY:
            balance, digests = sums.get(money.account, (0, set()))
            sums[money.account] = (balance + money.amount,
                                   digests | {money_digest(key)})


# The view.

VIEW_VERSION = 2
VIEW_SCHEMA = '''
CREATE TABLE shards (shard TEXT PRIMARY KEY, day INTEGER, size INTEGER);
CREATE TABLE sums (account TEXT PRIMARY KEY, amount TEXT);
CREATE TABLE machines (shard TEXT, machine TEXT, account TEXT, bytes INTEGER,
 stored INTEGER, up INTEGER, down INTEGER, amount TEXT,
 PRIMARY KEY (shard, machine, account));
CREATE INDEX machines_account ON machines (account);
CREATE TABLE entries (key TEXT PRIMARY KEY, account TEXT, kind TEXT,
 amount TEXT, time INTEGER, text TEXT);
CREATE INDEX entries_account ON entries (account);
CREATE TABLE included (account TEXT, digest TEXT,
 PRIMARY KEY (account, digest))'''


class View:
    """Balances, in SQLite: a function of the ledger.  Any thread, one at a
    time; several processes.

    `sums` are closing balances and what was used since, `included` the
    entries that are in these already.  `machines` has the bytes held after
    the last day, and what was used on the days of a month that is not over
    with it.  Amounts are text, as SQLite's numbers
    end at nine dollars.
    """

    SCHEMA, VERSION = VIEW_SCHEMA, VIEW_VERSION

    def __init__(self, path):
        self.path = path
        self.lock = threading.Lock()
        self.db = None

    def call(self, method, args):
        """Call a method; StoreError if it fails.  A damaged file is thrown
        away, and made anew by the next use.
        """
        import sqlite3
        with self.lock:
            try:
                if self.db is None:
                    self._open(sqlite3)
                run = self.db.execute
                run('BEGIN IMMEDIATE')
                try:
                    result = getattr(self, method)(run, *args)
                    run('COMMIT')
                    return result
                finally:
                    rollback(self.db)
            except (sqlite3.Error, OSError) as e:
                if not isinstance(e, (sqlite3.OperationalError, OSError)):
                    self.remove()
                raise StoreError('view', self.path, e) from e

    def _open(self, sqlite3):
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None,
                             check_same_thread=False)
        try:
            db.execute('PRAGMA journal_mode = WAL').fetchall()
            db.execute('PRAGMA synchronous = NORMAL')
            tables_make(db, self.SCHEMA, self.VERSION)
            os.chmod(self.path, 0o600)
        except (sqlite3.Error, OSError):
            db.close()
            raise
        self.db = db

    def close(self):
        if self.db:
            self.db.close()
            self.db = None

    def remove(self):
        self.close()
        for suffix in ('', '-wal', '-shm'):
            unlink_quietly(self.path + suffix)

    # What steps may wish; `run` is of an open transaction.

    @staticmethod
    def from_the_start(run):
        """True for a view of more than the last closings and after them."""
        return False

    @staticmethod
    def places(run):
        """{shard: (last day that is in it, size of its object)}."""
        return {shard: (day, size) for shard, day, size in run(
            'SELECT shard, day, size FROM shards')}

    @staticmethod
    def load(run, day, closed):
        """Begin anew after `day`, with closing balances then; None: nothing
        was billed.
        """
        for table in ('shards', 'sums', 'machines', 'entries', 'included'):
            run('DELETE FROM %s' % table)
        for shard in SHARDS if day is not None else ():
            run('INSERT INTO shards VALUES (?, ?, 0)', (shard, day))
        for account, (balance, digests) in closed.items():
            run('INSERT INTO sums VALUES (?, ?)', (account, str(balance)))
            for digest in digests:
                run('INSERT INTO included VALUES (?, ?)', (account, digest))

    @staticmethod
    def apply(run, usage, size, charge=True):
        """Add the Usage of a shard's next day, or only what is held then;
        False if another process was faster.
        """
        last = run('SELECT day FROM shards WHERE shard = ?', (usage.shard,)
                   ).fetchone()
        if last != (usage.day - charge,):
            return False
        run('UPDATE shards SET day = ?, size = ? WHERE shard = ?',
            (usage.day, size, usage.shard))
        spent = {machine: sum(usage.amounts(machine))
                 for machine, row in usage.rows.items() if row.account != '-'}
        View._machines(run, usage, spent, charge)
        used = collections.Counter()
        for machine, amount in spent.items():
            used[usage.rows[machine].account] += amount
        for account, amount in used.items() if charge else ():
            before = run('SELECT amount FROM sums WHERE account = ?',
                         (account,)).fetchone() or (0,)
            run('REPLACE INTO sums VALUES (?, ?)',
                (account, str(int(before[0]) - amount)))
        return True

    @staticmethod
    def _machines(run, usage, spent, charge):
        """Bring `machines` of a shard to the end of the day of a Usage, on
        which they `spent` that; the last day of a month ends its sums.
        """
        over = month_days(usage.day)[1] == usage.day + 1
        known, now = {}, {}
        for row, machine, account, *sums, amount in run(
                'SELECT rowid, machine, account, stored, up, down, amount '
                'FROM machines WHERE shard = ?', (usage.shard,)):
            known[machine, account] = row
            if not over:
                now[machine, account] = [0, *sums, int(amount)]
        for machine, amount in spent.items():
            row = usage.rows[machine]
            one = now.setdefault((machine, row.account), [0] * 5)
            one[0] = row.bytes
            if charge and not over:
                one[1] += row.stored
                one[2] += row.up
                one[3] += row.down
                one[4] += amount
        for key, row in known.items():
            if key not in now:
                run('DELETE FROM machines WHERE rowid = ?', (row,))
        for key, (*sums, amount) in now.items():
            if key in known:
                run('UPDATE machines SET bytes = ?, stored = ?, up = ?, '
                    'down = ?, amount = ? WHERE rowid = ?',
                    (*sums, str(amount), known[key]))
            else:
                run('INSERT INTO machines VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
                    (usage.shard, *key, *sums, str(amount)))

    @staticmethod
    def used(run, account):
        """(last day that all shards have, {machine: [bytes held, byte-days,
        up, down, attodollars]} of an account, for the days of its month).
        """
        day = run('SELECT min(day) FROM shards').fetchone()[0]
        return day, {machine: [*sums, int(amount)]
                     for machine, *sums, amount in run(
            'SELECT machine, bytes, stored, up, down, amount FROM machines '
            'WHERE account = ?', (account,))}

    @staticmethod
    def entries_lack(run, account, keys):
        """Those of `keys`, all entries of an account (None: of all), that
        are not in the view; what is in it and not among them goes.
        """
        where, args = ('WHERE account = ?', (account,)) if account else (
            '', ())
        known = {key for key, in run('SELECT key FROM entries ' + where,
                                     args)}
        for key in known.difference(keys):
            run('DELETE FROM entries WHERE key = ?', (key,))
        included = set(run('SELECT account, digest FROM included ' + where,
                           args))
        return [key for key in keys if key not in known and (
            key.split('/')[1], money_digest(key)) not in included]

    @staticmethod
    def entries_add(run, entries):
        """Add [(key, Money)]."""
        for key, money in entries:
            run('REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)', (
                key, money.account, money.kind, str(money.amount),
                money.time, money.text))

    @staticmethod
    def balance(run, account):
        """The Balance of an account."""
        return View._balance(run, account)

    @staticmethod
    def _balance(run, account):
        money = sum(int(amount) for amount, in run(
            'SELECT amount FROM sums WHERE account = ? UNION ALL '
            'SELECT amount FROM entries WHERE account = ?',
            (account, account)))
        held = run('SELECT sum(bytes) FROM machines WHERE account = ?',
                   (account,)).fetchone()[0]
        return Balance(money, held or 0)

    @staticmethod
    def balances(run):
        """{account: Balance} of all that ever used or paid something."""
        return {account: View._balance(run, account)
                for account, in run('SELECT account FROM sums UNION '
                                    'SELECT account FROM entries')
                .fetchall()}


def start_get():
    """Steps: the first day that is billed, None if nothing was yet."""
    key = 'ledger/start'
    try:
        return day_parse(lines_decode(key, (
            yield ('get', key, 0, None)))[0][1])
    except NoObject:
        return None


def start_make(day):
    """Steps: have billing begin with `day`, unless it has; the day."""
    key = 'ledger/start'
    yield from once(key, lines_encode(key, [('day', day_text(day))]))
    return (yield from start_get())


def view_good(start, places):
    """Steps: False if the view is not one of this ledger."""
    if start is None or not places:
        return start is None and not places
    sizes = yield ('all', [('size', usage_key(day, shard))
                           for shard, (day, size) in places.items() if size])
    return sizes == [size for _, size in places.values() if size]


def view_load(start):
    """Steps: begin the view anew, with the last closings that are whole."""
    if start is None:
        yield ('view', 'load', None, {})
        return
    count = collections.Counter(
        key.split('/')[1] for key in (yield ('list', 'closed/')))
    whole = [month for month, n in count.items() if n == len(SHARDS)]
    if not whole or (yield ('view', 'from_the_start')):
        yield ('view', 'load', start - 1, {})
        return
    first, after = month_days(day_parse(max(whole) + '-01'))
    closed = {}
    for shard in SHARDS:
        closed.update((yield from closed_get(first, shard)))
    yield ('view', 'load', after - 1, closed)
    for shard in SHARDS:
        key = usage_key(after - 1, shard)
        data = yield ('get', key, 0, None)
        yield ('view', 'apply', usage_decode(after - 1, shard, data),
               len(data), False)


def ledger_catch_up(account=None):
    """Steps: bring the view to the end of the ledger: all that was used, and
    the money of one account or of all.
    """
    start = yield from start_get()
    places = yield ('view', 'places')
    if not (yield from view_good(start, places)):
        yield from view_load(start)
    more = start is not None
    while more:
        more, places = False, (yield ('view', 'places'))
        datas = yield ('all', [
            ('get', usage_key(places[shard][0] + 1, shard), 0, None)
            for shard in SHARDS])
        for shard, data in zip(SHARDS, datas):
            if isinstance(data, NoObject):
                continue
            if isinstance(data, StoreError):
                raise data
            yield ('view', 'apply', usage_decode(
                places[shard][0] + 1, shard, data), len(data))
            more = True
    below = account + '/' if account else ''
    keys = (yield ('list', 'pay/' + below)) + (
        yield ('list', 'adjust/' + below))
    lack = yield ('view', 'entries_lack', account, keys)
    for i in range(0, len(lack), ASK_AT_ONCE):
        some = lack[i:i + ASK_AT_ONCE]
        yield ('view', 'entries_add', [
            (key, money_decode(key, data)) for key, data
            in zip(some, (yield from get_many(some)))
            if not isinstance(data, NoObject)])


# Billing, the standing of accounts.


class Foreseen:
    """What a dry run would charge."""

    def __init__(self):
        self.used = collections.Counter()   # account -> attodollars
        self.held = {}              # shard -> {account: bytes} at its end

    def add(self, usage):
        """The Usage of a shard's next day."""
        held = self.held[usage.shard] = collections.Counter()
        for machine, row in usage.rows.items():
            if row.account != '-':
                held[row.account] += row.bytes
                self.used[row.account] += sum(usage.amounts(machine))

    def balances(self, before):
        """{account: Balance} after it; `before` are those there are."""
        held = sum(self.held.values(), collections.Counter())
        return {account: Balance(
            before.get(account, Balance(0, 0)).money - self.used[account],
            held[account] if self.held else before[account].held)
            for account in before.keys() | self.used.keys()}


def bill(prices, dry=None, late=False):
    """Steps: charge every day that is over and was not charged, and close
    months; [(day, machines, byte-days, up, down, attodollars)].

    Any number of these may run at once, be killed and be late.  With `dry`, a
    Foreseen, that learns it and nothing is written.  ServerError for more than
    31 days, unless `late`.
    """
    now = yield ('now',)
    start = yield from start_get()
    if start is None:
        if not dry:
            yield from start_make(now // DAY)
        return []
    yield from ledger_catch_up()
    places = yield ('view', 'places')
    first = min(day for day, _ in places.values()) + 1
    last = (now - BILL_LATER) // DAY - 1
    if last - first >= BILL_MOST and not late:
        raise ServerError('%d days from %s on are to be billed; if the clock '
                          'is right, say --late'
                          % (last - first + 1, day_text(first)))
    lines = []
    if last >= first:
        lines = yield from bill_days(prices, start, first, last, dry)
    if not dry:
        yield from months_close(start, max(last, first - 1))
        yield from ledger_catch_up()
    return lines


def bill_days(prices, start, first, last, dry):
    """Steps: bill() from day `first` to `last`."""
    billing, before, lines = (yield from billing_load(start)), {}, []
    if first > start:
        for shard in SHARDS:
            before[shard] = yield from usage_get(first - 1, shard)
    for day in range(first, last + 1):
        total = [0] * 5
        for shard in SHARDS:
            usage = yield from usage_make(
                billing, day, shard, prices._replace(
                    storage=price_of_day(prices.storage, day)),
                before.get(shard))
            if dry:
                dry.add(usage)
            else:
                usage = usage_decode(day, shard, (
                    yield from once(usage.key(), usage.encode())))
            before[shard] = usage
            for machine, row in usage.rows.items():
                total = [a + b for a, b in zip(total, (
                    1, row.stored, row.up, row.down,
                    sum(usage.amounts(machine))))]
        lines.append((day, *total))
    return lines


def months_close(start, last):
    """Steps: close all months that are over with day `last` and are not."""
    there = set((yield ('list', 'closed/')))
    first, after = month_days(start)
    while after <= last + 1:
        if not there.issuperset(closed_key(first, x) for x in SHARDS):
            yield from month_close(start, first, after)
        first, after = month_days(after)


def bill_check(day):
    """Steps: what of a day's usage is not what logs and traffic say, lines.

    ServerError if the day was not billed.
    """
    start = yield from start_get()
    if start is None or day < start:
        raise ServerError('%s was not billed' % day_text(day))
    billing, wrong = (yield from billing_load(start)), []
    for shard in SHARDS:
        try:
            there = yield from usage_get(day, shard)
            before = None
            if day > start:
                before = yield from usage_get(day - 1, shard)
        except Damaged as e:
            wrong.append(str(e))
            continue
        if there is None:
            raise ServerError('%s was not billed' % day_text(day))
        made = yield from usage_make(billing, day, shard, there.prices,
                                     before, there)
        for machine in sorted(made.rows.keys() | there.rows.keys()):
            good, bad = made.rows.get(machine), there.rows.get(machine)
            if good != bad:
                wrong.append('%s machine %s: %s, should be %s' % (
                    there.key(), machine, used_text(bad), used_text(good)))
        if made.streams != there.streams:
            wrong.append('%s: traffic that was charged is missing'
                         % there.key())
    return wrong


def used_text(row):
    """A machine's day in words."""
    return 'nothing' if row is None else ' '.join(
        '%s %s' % pair for pair in zip(Used._fields, row))


def days_left(balance, prices, now):
    """Whole days for which a Balance pays what is stored; None: for ever."""
    daily = balance.held * price_of_day(prices.storage, now // DAY)
    return max(0, balance.money) // daily if daily else None


def standing_judge(before, balance, prices, now, amnesty):
    """What the standing of an account with a Balance is, a dict; `before` is
    the last one or None.

    Under an amnesty nobody is more than warned, and where all prices are 0
    nobody is that.
    """
    left = days_left(balance, prices, now)
    state, since = 'negative', now
    if not any(prices) or balance.money > 0 and (
            left is None or left >= WARN_DAYS):
        state = 'ok'
    elif balance.money >= 0 or amnesty:
        state = 'warned'
    was = before['state'] if before else None
    if state == 'negative' and was in ('negative', 'deletable'):
        since = before['since']
        if was == 'deletable' or now >= since + DELETE_DAYS * DAY:
            state = 'deletable'
    return {'state': state, 'since': since, 'money': balance.money}


def standing_prefix(account):
    return 'standing/%s/' % account


# An account was judged: its standing before, None for the first one, and now,
# the version of that, and whether it is a step that is to be written.
Judged = collections.namedtuple(
    'Judged', 'account before step version new balance left')


def standing_judged(accounts, prices, amnesty):
    """Steps: [Judged] of `accounts`, {id: Balance}; nothing is written."""
    newest = {}
    prefix = 'standing/'
    if len(accounts) == 1:
        prefix = standing_prefix(*accounts)
    for key in (yield ('list', prefix)):
        newest.setdefault(key.split('/')[1], key)
    now, judged = (yield ('now',)), []
    known = sorted(newest.keys() & accounts.keys())
    found = dict(zip(known, (yield from get_many(
        [newest[account] for account in known]))))
    for account, balance in sorted(accounts.items()):
        version, before = -1, None
        if account in found:
            if isinstance(found[account], NoObject):
                raise found[account]
            version = versioned_number(newest[account])
            before = versioned_decode(newest[account], found[account])
        step = standing_judge(before, balance, prices, now, amnesty)
        new = before is None or step['state'] != before['state']
        if new:
            step['was'] = before and before['state']
        judged.append(Judged(
            account, before, step if new else before, version + new, new,
            balance, days_left(balance, prices, now)))
    return judged


def standing_update(accounts, prices, amnesty, post=None):
    """Steps: judge `accounts`, {id: Balance}; [Judged] of those that changed.
    The view has been caught up.

    With a Post their owners are told: also of a step that somebody made who
    was killed before he could tell.
    """
    judged = yield from standing_judged(accounts, prices, amnesty)
    steps = [one for one in judged if one.new]
    made = yield from standing_put(steps)
    yield from mails_put((yield from standing_mails(post, judged)))
    return [one for one, new in zip(steps, made) if new]


def standing_mails(post, judged):
    """Steps: the Mails that tell owners of the last step of accounts, as
    Judged.
    """
    now, kinds, mails = (yield ('now',)), {}, []
    for one in judged if post else ():
        found = standing_kinds(one, now)
        if found:
            kinds[one.account] = found
    accounts = yield from accounts_load(list(kinds))
    for one in judged:
        account = accounts.get(one.account)
        if account is None or account.get('closed') or not mail_address(
                account['address']):
            continue
        today, since = now // DAY, one.step['since'] // DAY
        left = one.left or 0
        values = {
            'balance': money_short(one.balance.money),
            'date': day_text(today), 'since': day_text(since),
            'deletable': day_text(since + DELETE_DAYS), 'days': '%d' % left,
            'empty': day_text(today + left)}
        mails += [Mail(kind, account['address'], '%s/%d' % (
            one.account, one.version), values, one.account)
            for kind in kinds[one.account]]
    return mails


def standing_kinds(one, now):
    """Kinds of mails that tell of the last step of an account, as Judged."""
    step, kinds = one.step, []
    fine = step['state'] in ('ok', 'warned')
    # Nobody is told today that he paid long ago.
    if fine and step.get('was') in ('negative', 'deletable') and (
            now < step['since'] + DELETE_DAYS * DAY):
        kinds.append('reinstated')
    if step['state'] != 'ok' and not (fine and one.left is None):
        kinds.append(step['state'])
    return kinds


def standing_put(steps):
    """Steps: the one place where balances take steps, as Judged; for each
    False if another process made it.
    """
    return (yield from put_many([versioned_object(
        standing_prefix(one.account), one.version, one.step)
        for one in steps]))


def funds_missing(machine):
    """Steps: the Balance of whoever pays for a machine, if that is not
    positive; None if the machine may go on, and where nobody pays for it.
    """
    account = yield from owner_get(machine)
    if account is None:
        return None
    # A balance gets smaller when it is billed, and then this is known.
    standing = yield from versioned_get(standing_prefix(account))
    if standing and standing[1]['state'] == 'ok':
        return None
    yield from ledger_catch_up(account)
    balance = yield ('view', 'balance', account)
    return None if balance.money > 0 else balance


##############################################################################
# Reports
#
# What a month was for all accounts, or for one.  Made of days, entries and
# closings alone, which never change: neither the view nor anything else that
# a server or a bill could wait for is held meanwhile.  Where nothing is
# charged, what was used comes from the logs.  All that reads is steps.
##############################################################################

# What is charged, as Usage.amounts() has it and the original's lists call it.
CHARGES = ('Daily storage', 'Client->Server bandwidth',
           'Server->Client bandwidth')
# What was entered in a month: {account: amount at its begin}, [(key, Money)]
# by time, and {account: closing balance}, None if it is not closed.
Entered = collections.namedtuple('Entered', 'opening entries closed')
# A line of a statement: a charge, with quantity and price, or an entry, with
# None for these, its name and a text.  `amount` is what the balance grows by.
Line = collections.namedtuple(
    'Line', 'day machine kind quantity price amount name text')


def month_parse(text):
    """The first day of a month; ServerError if it is none."""
    try:
        return day_parse(text + '-01')
    except ServerError:
        raise ServerError('%s is not a month like 2026-11'
                          % printable(text)) from None


def closings(first, account=None):
    """Steps: closing balances of a month, as in closed_get, of an account's
    shard or of all; None if they are not whole.
    """
    found = {}
    for shard in account[0] if account else SHARDS:
        one = yield from closed_get(first, shard)
        if one is None:
            return None
        found.update(one)
    if account:
        return {account: found[account]} if account in found else {}
    return found


def month_before(start, first, keys, account):
    """Steps: what the closings of the month before day `first` say, or would
    say if they were there; `keys` are all entries.
    """
    sums, begin = {}, month_days(first - 1)[0]
    if start is not None and first > start:
        sums = yield from closings(begin, account)
        if sums is not None:
            return sums
        sums = yield from month_before(start, begin, keys, account)
        spent = Spent()
        yield from month_usage(start, begin, first, spent.add, account)
        month_spend(sums, spent.of)
    yield from month_add(sums, first, keys)
    return sums


def month_entered(start, first, account=None):
    """Steps: the Entered of a month, of an account or of all."""
    after, below = month_days(first)[1], '%s/' % account if account else ''
    keys = (yield ('list', 'pay/' + below)) + (
        yield ('list', 'adjust/' + below))
    before = yield from month_before(start, first, keys, account)
    closed = yield from closings(first, account)

    def included(key, sums):
        return money_digest(key) in sums.get(key.split('/')[1], (0, ()))[1]

    new = [key for key in keys if not included(key, before) and (
        closed is None or included(key, closed))]
    entries = [(key, money_decode(key, data)) for key, data
               in zip(new, (yield from get_many(new)))
               if not isinstance(data, NoObject)]
    return Entered(
        {account: balance for account, (balance, _) in before.items()},
        sorted([(key, money) for key, money in entries
                if closed or money.time < after * DAY],
               key=lambda entry: (entry[1].time, entry[0])),
        closed and {account: balance
                    for account, (balance, _) in closed.items()})


class Tally:
    """What an account used in a month: `add` its machines' days in order."""

    __slots__ = ('machines', 'stored', 'up', 'down', 'day', 'held', 'amounts')

    def __init__(self):
        self.machines = set()
        self.stored = 0             # byte-days
        self.up = self.down = 0     # bytes
        self.day = None             # the last one, and bytes live after it
        self.held = 0
        self.amounts = (0, 0, 0)    # as in Usage.amounts()

    def add(self, day, machine, row, amounts=(0, 0, 0)):
        if day != self.day:
            self.day, self.held = day, 0
        self.machines.add(machine)
        self.held += row.bytes
        self.stored += row.stored
        self.up += row.up
        self.down += row.down
        self.amounts = tuple(map(sum, zip(self.amounts, amounts)))


def logs_usage(first, after, add, account=None):
    """Steps: as month_usage(), of the days that are over, from the logs: for
    servers where nothing is charged.  Nobody noted what was sent.
    """
    after = min(after, (yield ('now',)) // DAY)
    owners = yield from owner_versions()
    machines = ['%016x' % number for number in (yield from machine_numbers())]
    logs = yield from log_since(dict.fromkeys(machines, 0), after * DAY, {})
    at = dict.fromkeys(logs, (0, 0, 0))     # entries passed, k, live bytes
    for day in range(first, after):
        usage = Usage(day, '-', Prices(0, 0, 0))
        for machine, entries in logs.items():
            owner = owner_at(owners.get(machine, ()), (day + 1) * DAY)
            i, k, held = at[machine]
            while i < len(entries) and entries[i][1] < day * DAY:
                i, k, held = i + 1, entries[i][0], entries[i][2]
            today = list(itertools.takewhile(
                lambda entry: entry[1] < (day + 1) * DAY, entries[i:]))
            stored = stored_days(today, held, day * DAY)
            if today:
                k, _, held, _ = today[-1]
            at[machine] = i + len(today), k, held
            if k and account in (None, owner):
                usage.rows[machine] = Used(owner, k, held, stored, sum(
                    entry[3] for entry in today), 0)
        add(usage)
    return after - 1


def month_days_used(first, add, account=None):
    """Steps: (first day, last day, True if they were charged) for which `add`
    was called with a Usage; the last one is before the first if there is none.
    """
    after, start = month_days(first)[1], (yield from start_get())
    if start is not None:
        begin = max(first, start)
        last = yield from month_usage(start, first, after, add, account)
        if last >= begin:
            return begin, last, True
    return first, (yield from logs_usage(first, after, add, account)), False


def month_head(first, days, entered):
    """What a report says of its month, a dict of JSON values."""
    begin, last, charged = days
    return {'month': month_text(first), 'days': max(0, last + 1 - begin),
            'first day': day_text(begin) if last >= begin else None,
            'last day': day_text(last) if last >= begin else None,
            'charged': charged, 'closed': entered.closed is not None}


def closed_differ(first, entered, balances):
    """Where closings say other than `balances` {account: attodollars}, which
    days and entries make: a line for each.
    """
    closed = balances if entered.closed is None else entered.closed
    return ['%s: %s has %s, but days and entries make %s' % (
        closed_key(first, account[0]), account,
        money_text(closed.get(account, 0)),
        money_text(balances.get(account, 0)))
        for account in sorted(closed.keys() | balances.keys())
        if closed.get(account, 0) != balances.get(account, 0)]


# A row of a month's report; all of REPORT_MONEY are attodollars.
REPORT_BYTES = ('bytes average', 'bytes end', 'bytes up', 'bytes down')
REPORT_CHARGES = ('storage', 'upload', 'download')
REPORT_ENTRIES = {'payment': 'payments', 'refund': 'refunds',
                  'chargeback': 'chargebacks', 'reversal': 'reversals',
                  'credit': 'credits', 'adjustment': 'adjustments'}
REPORT_MONEY = ('opening', *REPORT_CHARGES, *REPORT_ENTRIES.values(),
                'closing')
REPORT_SUMS = ('revenue', 'received', 'unpaid', 'prepaid')
REPORT_FIELDS = ('account', 'user', 'machines', *REPORT_BYTES, *REPORT_MONEY)


def month_report(first):
    """Steps: (head, rows, totals, lines of what is wrong) of a month: dicts
    with names of REPORT_FIELDS and more, for each account that is open or had
    something then.  Machines of nobody are a row with account `-`.
    """
    tallies = {}

    def add(usage):
        for machine, row in usage.rows.items():
            tallies.setdefault(row.account, Tally()).add(
                usage.day, machine, row, usage.amounts(machine))

    days = yield from month_days_used(first, add)
    entered = yield from month_entered((yield from start_get()), first)
    head = month_head(first, days, entered)
    users = yield from accounts_newest()
    after = month_days(first)[1] * DAY
    idents = {ident for ident, user in users.items() if user and (
        not user.get('closed') and user['created'] < after)}
    idents.update(tallies, (ident for ident, balance
                            in entered.opening.items() if balance),
                  (money.account for _, money in entered.entries))
    rows = {ident: report_row(ident, users.get(ident), head, days[1],
                              tallies.get(ident), entered)
            for ident in sorted(idents)}
    for _, money in entered.entries:
        rows[money.account][REPORT_ENTRIES[money.kind]] += money.amount
        rows[money.account]['closing'] += money.amount
    machines = set().union(*(tally.machines for tally in tallies.values()))
    wrong = closed_differ(first, entered, {
        ident: row['closing'] for ident, row in rows.items()})
    rows = sorted(rows.values(), key=lambda row: (row['user'], row['account']))
    return head, rows, report_totals(rows, len(machines)), wrong


def report_row(ident, user, head, last, tally, entered):
    """A row of month_report(), without what was entered."""
    tally = tally or Tally()
    row = dict.fromkeys(REPORT_FIELDS, 0)
    row.update(
        {'account': ident, 'user': user['address'] if user else '?',
         'machines': len(tally.machines),
         'bytes average': tally.stored // (head['days'] or 1),
         'bytes end': tally.held if tally.day == last else 0,
         'bytes up': tally.up, 'bytes down': tally.down,
         'opening': entered.opening.get(ident, 0)},
        **dict(zip(REPORT_CHARGES, tally.amounts)))
    if ident == '-':
        row['user'] = '-'
    row['closing'] = row['opening'] - sum(tally.amounts)
    return row


def report_totals(rows, machines):
    """Sums of rows; `revenue` is what was charged, `received` what was paid
    less what went back, `unpaid` and `prepaid` what accounts owe and have.
    """
    totals = {name: sum(row[name] for row in rows)
              for name in REPORT_BYTES + REPORT_MONEY}
    totals.update({
        'accounts': sum(row['account'] != '-' for row in rows),
        'machines': machines,
        'revenue': sum(totals[name] for name in REPORT_CHARGES),
        'received': sum(totals[REPORT_ENTRIES[kind]] for kind in PAID),
        'unpaid': sum(max(0, -row['closing']) for row in rows),
        'prepaid': sum(max(0, row['closing']) for row in rows)})
    return totals


def accounts_newest():
    """Steps: {id: account} of all, also closed ones; None for one that is
    damaged, which is said.
    """
    return (yield from accounts_get('account/'))


def accounts_load(idents):
    """Steps: {id: account} of some, as accounts_newest()."""
    if not idents:
        return {}
    wanted = set(idents)
    return (yield from accounts_get(
        'account/' if len(wanted) > 1 else account_prefix(*wanted), wanted))


def accounts_get(prefix, wanted=None):
    """Steps: accounts_newest() of what begins with `prefix`, or of those
    `wanted` of it.
    """
    newest, found = {}, {}
    for key in (yield ('list', prefix)):
        newest.setdefault(key.split('/')[1], key)
    newest.pop(DECOY, None)
    if wanted is not None:
        newest = {ident: key for ident, key in newest.items()
                  if ident in wanted}
    for ident, data in zip(newest, (yield from get_many(
            list(newest.values())))):
        try:
            found[ident] = versioned_decode(newest[ident], data)
        except Damaged as e:
            found[ident] = None
            yield ('log', str(e))
    return found


def statement_lines(used, entries):
    """[Line] by day, with what was entered on one before what was used.

    `used` are (day, machine, (stored, up, down), their prices), `entries`
    (time, key, kind, amount, text); each in the order it is to have.
    """
    lines = [Line(when // DAY, '', kind, None, None, amount,
                  key.split('/')[2], text)
             for when, key, kind, amount, text in entries]
    lines += [Line(day, machine, kind, quantity, price, -quantity * price,
                   '', '')
              for day, machine, quantities, prices in used
              for kind, quantity, price in zip(CHARGES, quantities, prices)
              if quantity]
    return sorted(lines, key=lambda line: (line.day,
                                           line.quantity is not None))


def account_statement(account, first):
    """Steps: (head, opening balance, [Line], closing balance, lines of what
    is wrong) of an account's month.
    """
    used = []

    def add(usage):
        used.extend((usage.day, machine, (row.stored, row.up, row.down),
                     usage.prices)
                    for machine, row in sorted(usage.rows.items()))

    days = yield from month_days_used(first, add, account)
    entered = yield from month_entered((yield from start_get()), first,
                                       account)
    lines = statement_lines(used, [
        (money.time, key, money.kind, money.amount, money.text)
        for key, money in entered.entries])
    opening = entered.opening.get(account, 0)
    closing = opening + sum(line.amount for line in lines)
    return (month_head(first, days, entered), opening, lines, closing,
            closed_differ(first, entered, {account: closing}))


##############################################################################
# Site
#
# What the account pages must know of a server whose directory they cannot
# read: it is said among the accounts, where both can.  Versioned.
##############################################################################

SITE = 'site/'


def site_get():
    """Steps: what was said last, a dict; empty if nothing was."""
    found = yield from versioned_get(SITE)
    return found[1] if found else {}


def site_put(facts):
    """Steps: say it, unless it was said already."""
    found = yield from versioned_get(SITE)
    if found is None or found[1] != facts:
        yield from versioned_put(SITE, found[0] + 1 if found else 0, facts)


FIGURES_SECONDS = 60


def machine_figures(machine, held, prices, amnesty, much, whole):
    """Steps: what a machine that stores `held` bytes is told in FIGURES, as
    (name, value): its size and the Prices, if somebody pays for it; with
    `much` what it used this month and how long the balance lasts, and with
    `whole` what its account did and has.
    """
    lines = [('machine-bytes', held)]
    account = (yield from owner_get(machine)) if prices else None
    if account is None:
        return lines
    lines += [('price-storage', prices.storage), ('price-upload', prices.up),
              ('price-download', prices.down)]
    if not much:
        return lines
    yield from ledger_catch_up(account)
    now, (day, used) = (yield ('now',)), (yield ('view', 'used', account))
    if day is not None:
        first = max((yield from start_get()), month_days(day + 1)[0])
        if first <= day:
            lines += [('first-day', day_text(first)),
                      ('last-day', day_text(day))]
    mine = used.pop('%016x' % machine, [0] * 5)
    names = ('stored', 'up', 'down', 'charged')
    lines += [('machine-' + name, value)
              for name, value in zip(names, mine[1:])]
    balance = yield ('view', 'balance', account)
    # The ledger knows what was held at the end of a day, we know it now.
    balance = balance._replace(held=balance.held - mine[0] + held)
    standing = yield from versioned_get(standing_prefix(account))
    standing = standing_judge(standing and standing[1], balance, prices, now,
                              amnesty)
    left = days_left(balance, prices, now)
    lines.append(('standing', standing['state']))
    lines += [] if left is None else [('days-left', left)]
    if whole:
        sums = [sum(column) for column in zip(mine, *used.values())]
        lines += [('account-machines', len(used) + 1),
                  ('account-bytes', balance.held)]
        lines += [('account-' + name, value)
                  for name, value in zip(names, sums[1:])]
        lines.append(('balance', balance.money))
    return lines


##############################################################################
# Payments
#
# How an account's owner pays through Stripe or PayPal, and how the ledger gets
# to say so.  All are steps; the wish ('provider', NAME, ...) asks its API.
#
#     checkout/due/ACCOUNT-ID     not known yet how it ended; deleted then
#     checkout/asked/ACCOUNT/ID   what is to be paid, before anybody is asked
#     checkout/made/ACCOUNT/ID    what the provider calls it
#     checkout/seen/PROVIDER/...  versioned: how far its events were read
#
# ACCOUNT-ID is drawn first.  It goes with the call as its idempotency key and
# into what the provider keeps, so an answer that is lost loses nothing.
#
# Nothing that a browser or a webhook says is entered: they say where to look.
# Entered is what the provider's API answers then, under the name that has
# there.  So it is the same how often, how late, in what order and by how many
# processes it is done, and where they are killed.
##############################################################################

CENT = ATTO // 100
CURRENCY = 'USD'
CHECKOUT_SECONDS = 2 * 3600     # to pay in, at Stripe; it takes 30 min to 24 h
CHECKOUT_DAYS = 5               # what is not paid then never will be: PayPal
#                                 keeps an order for three days at most
CHECKOUT_MOST = 20              # of an account, due at once
EVENT_DAYS = 30                 # for which both providers list events
LIST_MOST = 10 ** 6             # items
EVENT_OVERLAP = DAY             # read again, as clocks differ and lists lag
PROVIDER_NAMES = {'stripe': 'Stripe', 'paypal': 'PayPal'}

# What a checkout is about; `session` is the provider's name of it or None.
Checkout = collections.namedtuple(
    'Checkout', 'name account provider cents time session')

STRIPE_EVENTS = [
    'checkout.session.completed', 'checkout.session.async_payment_succeeded',
    'checkout.session.async_payment_failed', 'checkout.session.expired',
    'charge.refunded', 'charge.refund.updated', 'refund.created',
    'refund.updated', 'refund.failed', 'charge.dispute.created',
    'charge.dispute.updated', 'charge.dispute.closed',
    'charge.dispute.funds_withdrawn', 'charge.dispute.funds_reinstated']
PAYPAL_EVENTS = [
    'CHECKOUT.ORDER.APPROVED', 'CHECKOUT.ORDER.COMPLETED',
    'PAYMENT.CAPTURE.COMPLETED', 'PAYMENT.CAPTURE.PENDING',
    'PAYMENT.CAPTURE.DENIED', 'PAYMENT.CAPTURE.DECLINED',
    'PAYMENT.CAPTURE.REFUNDED', 'PAYMENT.CAPTURE.REVERSED',
    'CUSTOMER.DISPUTE.CREATED', 'CUSTOMER.DISPUTE.UPDATED',
    'CUSTOMER.DISPUTE.RESOLVED']
# Ends of a PayPal dispute after which the seller has the money.
DISPUTE_WON = {'RESOLVED_SELLER_FAVOUR', 'RESOLVED_WITH_PAYOUT',
               'CANCELED_BY_BUYER', 'DENIED'}


class Outcome:
    """What steps here did: `state` of the last checkout, lines of what was
    entered, and lines of what differs and is for the operator to judge.
    """

    # Of a checkout: open (to be paid), waiting (for the bank), paid, ended
    # (never will be), differs, unknown.

    __slots__ = ('state', 'did', 'differs', 'again')

    def __init__(self):
        self.state = 'unknown'
        self.did = []
        self.differs = []
        self.again = False          # what differs may be right later

    def wrong(self, checkout, text):
        self.state = 'differs'
        self.differs.append('checkout %s of account %s: %s' % (
            checkout.session or checkout.name, checkout.account, text))


class Forged(ServerError):
    """A webhook that its provider did not send, or long ago."""


MUST = object()


def pick(answer, path, kind=str, default=MUST):
    """What is at `path` in a provider's JSON, such as 'links.0.href'.

    `default` if nothing is; ProviderError if that is not allowed, or it is
    not of that kind.
    """
    value = answer
    for part in path.split('.'):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = None
    if value is None and default is not MUST:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProviderError('an answer without a good %s' % path)
    return value


def ident_check(text):
    """A provider's name of something, as a part of a URL and of a key."""
    if not 0 < len(text) <= 150 or not all(
            c.isascii() and (c.isalnum() or c in '_-') for c in text):
        raise ProviderError('an answer with the name %s' % printable(text))
    return text


def list_check(found):
    """ProviderError for a list that does not end."""
    if len(found) > LIST_MOST:
        raise ProviderError('a list of more than %d' % LIST_MOST)


# Checkouts.


def checkout_key(place, name):
    return 'checkout/%s/%s' % (place, name.replace('-', '/'))


def checkout_due(name):
    return 'checkout/due/' + name


def checkout_load(name):
    """Steps: the Checkout of that name, or None."""
    import re
    if not re.fullmatch('[0-9a-f]{16}-[0-9a-f]{24}', name):
        return None
    asked = yield from summed_get(checkout_key('asked', name))
    if asked is None:
        return None
    made = yield from summed_get(checkout_key('made', name))
    return Checkout(name, name[:16], asked['provider'], asked['cents'],
                    asked['time'], made and made['session'])


def checkout_least(shop, account):
    """Steps: the fewest dollars that may be paid: more the first time."""
    first = True
    for money in (yield from pay_entries(account)).values():
        first = first and money.kind != 'payment'
    return max(shop.first, shop.least) if first else shop.least


def checkout_begin(shop, provider, account, dollars):
    """Steps: (name of a new checkout, where to send the payer's browser).

    Durable on return.  ServerError if so much cannot be paid, or so often;
    ProviderError if the provider does not take it now: nothing was charged.
    """
    if provider not in shop.offered():
        raise ServerError('%s is no way to pay here' % printable(provider))
    least = yield from checkout_least(shop, account)
    if not least <= dollars <= shop.most:
        raise ServerError('$%d to $%d can be paid at once'
                          % (least, shop.most))
    if len((yield ('list', checkout_due(account + '-')))) >= CHECKOUT_MOST:
        raise ServerError('too many payments were begun and not made; '
                          'try again tomorrow')
    now = yield ('now',)
    name = '%s-%08x%s' % (account, now, (yield ('random', 8)).hex())
    checkout = Checkout(name, account, provider, dollars * 100, now, None)
    for key, value in (
            (checkout_due(name), {'time': now}),
            (checkout_key('asked', name), {
                'provider': provider, 'cents': checkout.cents,
                'currency': CURRENCY, 'time': now})):
        yield from once(key, versioned_encode(key, value))
    begin = stripe_begin if provider == 'stripe' else paypal_begin
    session, url = yield from begin(shop, checkout)
    if not url.startswith(shop.pages(provider) + '/') or not (
            url.isascii() and url.isprintable() and ' ' not in url):
        raise ProviderError('payment at %s, which is not %s' % (
            printable(url), shop.pages(provider)))
    key = checkout_key('made', name)
    yield from once(key, versioned_encode(key, {
        'session': ident_check(session), 'time': now}))
    return name, url


def checkout_settle(shop, out, name, session=None):
    """Steps: read at the provider how a checkout stands, and have the ledger
    say so.  What came of it is in `out`, an Outcome.

    `session` is tried where nobody had time to write down what it is called.
    """
    checkout = yield from checkout_load(name)
    out.state = 'unknown'
    if checkout is None:
        return
    if checkout.session is None:
        checkout = checkout._replace(session=session)
    out.state = 'open'
    if checkout.session is not None:
        settle = (stripe_settle if checkout.provider == 'stripe'
                  else paypal_settle)
        yield from settle(shop, out, checkout)
    if out.state == 'open' and (yield from checkout_late(checkout)):
        out.state = 'ended'
    if out.state in ('paid', 'ended'):
        yield ('delete', checkout_due(name))


def checkout_late(checkout):
    """Steps: True if what was not paid by now never will be."""
    return (yield ('now',)) > checkout.time + CHECKOUT_DAYS * DAY


def checkout_good(out, checkout, name, cents, currency):
    """Steps: True if so much was to be paid, or an operator has entered under
    that name what is right; else it is said what differs.
    """
    if (cents, currency.upper()) == (checkout.cents, CURRENCY) or name in (
            yield from pay_entries(checkout.account)):
        return True
    out.wrong(checkout, '%s is %d.%02d %s in place of %d.%02d %s; it is not '
              'entered' % (
                  name, *divmod(cents, 100), printable(currency.upper()),
                  *divmod(checkout.cents, 100), CURRENCY))
    return False


# What is entered.


def pay_entries(account):
    """Steps: {name: Money} of what an account has paid."""
    return {key.split('/')[2]: money for key, money in (
        yield from ledger_payments(account)).items()}


def pay_enter(shop, out, account, kind, name, cents, of=''):
    """Steps: enter what a provider says; `name` is PROVIDER-ITS NAME, and so
    is `of`, the payment that it is about.

    What is there under that name stands: an operator may have entered
    another amount, and knows why.
    """
    known = (yield from pay_entries(account)).get(name)
    found = known or Money(account, kind, PAID[kind] * cents * CENT, 0, '',
                           of)
    provider, _, reference = name.partition('-')
    new = yield from ledger_pay(account, provider, reference, found.amount,
                                found.kind, found.text, shop.post, found.of)
    if known or not new:
        return
    out.did.append('%s of %s entered for account %s: %s' % (
        kind, money_short(abs(found.amount)), account, name))
    if shop.prices:
        yield from ledger_catch_up(account)
        balance = yield ('view', 'balance', account)
        yield from standing_update({account: balance}, shop.prices,
                                   shop.amnesty, shop.post)


def pay_back(shop, out, checkout, paid, kind, name, cents, undone=None):
    """Steps: enter that so much of payment `paid` was taken back, and if it
    was `undone`, a word, that it was given again.

    Only of a payment that was entered, and no more than that.
    """
    if cents <= 0:
        raise ProviderError('an answer with a %s of nothing' % kind)
    entries = yield from pay_entries(checkout.account)
    if paid not in entries:
        out.wrong(checkout, '%s %s of a payment that was not entered'
                  % (kind, name))
        out.again = True
        return
    left = sum(money.amount for at, money in entries.items()
               if at == paid or money.of == paid and not undone)
    if name not in entries and left < cents * CENT:
        out.wrong(checkout, '%s %s of %d.%02d is more than is left of %s'
                  % (kind, name, *divmod(cents, 100), paid))
        return
    yield from pay_enter(shop, out, checkout.account, kind, name, cents, paid)
    if undone:
        yield from pay_enter(shop, out, checkout.account, 'reversal',
                             '%s.%s' % (name, undone), cents, paid)


# Stripe.


def stripe_get(path):
    return (yield ('provider', 'stripe', 'GET', path, None, None))


def stripe_list(path):
    """Steps: all items of a list, the newest first."""
    found, after = [], ''
    while True:
        page = yield from stripe_get(path + '&limit=100' + after)
        items = pick(page, 'data', list)
        found += items
        if page.get('has_more') is not True or not items:
            return found
        after = '&starting_after=' + ident_check(pick(items[-1], 'id'))
        list_check(found)


def stripe_price():
    """Steps: the id of the Price of one dollar at Stripe, made if need be."""
    for price in (yield from stripe_list(
            '/v1/prices?active=true&lookup_keys[]=tarsnapd-dollar')):
        if pick(price, 'lookup_key', str, '') == 'tarsnapd-dollar':
            return pick(price, 'id')
    key = 'tarsnapd-' + (yield ('random', 16)).hex()
    product = yield ('provider', 'stripe', 'POST', '/v1/products', {
        'name': 'Backup, prepaid'}, key + '-product')
    price = yield ('provider', 'stripe', 'POST', '/v1/prices', {
        'product': pick(product, 'id'), 'currency': CURRENCY.lower(),
        'unit_amount': 100, 'lookup_key': 'tarsnapd-dollar',
        'transfer_lookup_key': 'true'}, key)
    return pick(price, 'id')


def stripe_begin(shop, checkout):
    """Steps: (id of a Checkout Session, its URL)."""
    mark = {'checkout': checkout.name}
    session = yield (
        'provider', 'stripe', 'POST', '/v1/checkout/sessions', {
            'mode': 'payment',
            'line_items': [{'price': shop.price,
                            'quantity': checkout.cents // 100}],
            'success_url': shop.page(checkout),
            'cancel_url': shop.page(checkout),
            'client_reference_id': checkout.name, 'metadata': mark,
            'payment_intent_data': {'metadata': mark},
            'expires_at': checkout.time + CHECKOUT_SECONDS}, checkout.name)
    return pick(session, 'id'), pick(session, 'url')


def stripe_settle(shop, out, checkout):
    """Steps: checkout_settle() of a Checkout Session."""
    session = yield from stripe_get(
        '/v1/checkout/sessions/%s?expand[]=payment_intent'
        % ident_check(checkout.session))
    if pick(session, 'metadata.checkout') != checkout.name:
        out.wrong(checkout, 'Stripe says that it is another one')
        return
    status = pick(session, 'status')
    payment = pick(session, 'payment_status')
    if payment == 'paid':
        # A test double does not say how much; Stripe does.
        cents = pick(session, 'amount_total', int,
                     checkout.cents if shop.lax('stripe') else MUST)
        currency = pick(session, 'currency', str,
                        CURRENCY if shop.lax('stripe') else MUST)
        name = 'stripe-' + checkout.session
        if (yield from checkout_good(out, checkout, name, cents, currency)):
            yield from pay_enter(shop, out, checkout.account, 'payment', name,
                                 cents)
            out.state = 'paid'
    elif status == 'expired':
        out.state = 'ended'
    elif status == 'complete' and payment == 'unpaid':
        # A bank debit or transfer: it takes days, and may fail.
        intent = pick(session, 'payment_intent', (dict, str), {})
        failed = isinstance(intent, dict) and intent.get('status') in (
            'requires_payment_method', 'canceled')
        out.state = 'ended' if failed else 'waiting'
    elif status != 'open':
        out.wrong(checkout, 'Stripe says %s, %s' % (
            printable(status), printable(payment)))


def stripe_event(shop, out, event):
    """Steps: do what a Stripe event is about."""
    thing = pick(event, 'data.object', dict)
    if pick(event, 'type') not in STRIPE_EVENTS:
        return
    if thing.get('object') == 'checkout.session':
        name = pick(thing, 'metadata.checkout', str, '')
        yield from checkout_settle(shop, out, name, pick(thing, 'id'))
        return
    ident = pick(thing, 'payment_intent', str, '')
    if not ident:
        return
    intent = yield from stripe_get('/v1/payment_intents/'
                                   + ident_check(ident))
    checkout = yield from checkout_load(
        pick(intent, 'metadata.checkout', str, ''))
    if checkout is None or checkout.session is None:
        return                          # of something else that is sold
    paid = 'stripe-' + checkout.session
    if paid not in (yield from pay_entries(checkout.account)):
        yield from checkout_settle(shop, out, checkout.name)
    if thing.get('object') == 'dispute':
        yield from stripe_disputes(shop, out, checkout, paid, ident)
    else:
        yield from stripe_refunds(shop, out, checkout, paid, ident)


def stripe_refunds(shop, out, checkout, paid, intent):
    """Steps: enter all refunds of a payment."""
    for refund in (yield from stripe_list(
            '/v1/refunds?payment_intent=' + intent)):
        if pick(refund, 'currency').upper() != CURRENCY:
            out.wrong(checkout, 'a refund in another currency')
            continue
        failed = pick(refund, 'status') in ('failed', 'canceled')
        yield from pay_back(
            shop, out, checkout, paid, 'refund',
            'stripe-' + ident_check(pick(refund, 'id')),
            pick(refund, 'amount', int), 'failed' if failed else None)


def stripe_disputes(shop, out, checkout, paid, intent):
    """Steps: enter all disputes of a payment in which money was taken."""
    for dispute in (yield from stripe_list(
            '/v1/disputes?payment_intent=' + intent)):
        status = pick(dispute, 'status')
        if status.startswith('warning_') or status == 'prevented':
            continue                    # only asked about
        if pick(dispute, 'currency').upper() != CURRENCY:
            out.wrong(checkout, 'a dispute in another currency')
            continue
        yield from pay_back(
            shop, out, checkout, paid, 'chargeback',
            'stripe-' + ident_check(pick(dispute, 'id')),
            pick(dispute, 'amount', int), 'won' if status == 'won' else None)


def stripe_verify(header, body, secrets, now):
    """Forged unless Stripe signed a webhook's body, bytes, of late.

    The header is t=SECONDS,v1=HEX,...: HMAC-SHA-256 of "SECONDS." and the
    body, with the endpoint's secret as it stands; while that is being
    exchanged there are several.  Other schemes are for tests only.
    """
    times, signatures = [], []
    for part in header.split(','):
        name, _, value = part.strip().partition('=')
        if name == 't' and value.isascii() and value.isdigit():
            times.append(value)
        elif name == 'v1':
            signatures.append(value.encode('utf-8', 'replace'))
    if len(times) != 1 or len(times[0]) > 12:
        raise Forged('a webhook without a good signature')
    good = False
    for secret in secrets:
        wanted = hmac.digest(secret.encode(), times[0].encode() + b'.' + body,
                             'sha256').hex().encode()
        for signature in signatures:
            good |= hmac.compare_digest(wanted, signature)
    if not good:
        raise Forged('a webhook without a good signature')
    if int(times[0]) < now - WEBHOOK_SECONDS:
        raise Forged('a webhook that was signed long ago')


WEBHOOK_SECONDS = 300           # Stripe's own tolerance


# PayPal.


def paypal_get(path, absent=(404,)):
    """Steps: an answer, or None for a status among `absent`."""
    try:
        return (yield ('provider', 'paypal', 'GET', path, None, None))
    except ProviderError as e:
        if e.status in absent:
            return None
        raise


def paypal_cents(amount, path):
    """(cents, currency) of an amount in an answer."""
    try:
        return (money_parse(pick(amount, path + '.value'), 2),
                pick(amount, path + '.currency_code'))
    except ServerError as e:
        raise ProviderError('an answer in which %s' % e) from None


def paypal_begin(shop, checkout):
    """Steps: (id of an order, where it is approved)."""
    order = yield ('provider', 'paypal', 'POST', '/v2/checkout/orders', {
        'intent': 'CAPTURE',
        'purchase_units': [{
            'custom_id': checkout.name, 'invoice_id': checkout.name,
            'description': 'Backup, prepaid',
            'amount': {'currency_code': CURRENCY,
                       'value': '%d.%02d' % divmod(checkout.cents, 100)}}],
        'payment_source': {'paypal': {'experience_context': {
            'return_url': shop.page(checkout),
            'cancel_url': shop.page(checkout),
            'shipping_preference': 'NO_SHIPPING',
            'user_action': 'PAY_NOW'}}}}, checkout.name)
    for link in pick(order, 'links', list):
        if pick(link, 'rel') in ('payer-action', 'approve'):
            return pick(order, 'id'), pick(link, 'href')
    raise ProviderError('an order that nobody can approve')


def paypal_settle(shop, out, checkout):
    """Steps: checkout_settle() of an order; one that was approved is
    captured, whether its payer came back or not.
    """
    path = '/v2/checkout/orders/' + ident_check(checkout.session)
    order = yield from paypal_get(path)
    if order and pick(order, 'status') == 'APPROVED':
        order = yield from paypal_capture(checkout, path, order)
    if order is None:
        return                          # it lapsed, or is not there yet
    if pick(order, 'purchase_units.0.custom_id') != checkout.name:
        out.wrong(checkout, 'PayPal says that it is another one')
    elif pick(order, 'status') == 'VOIDED':
        out.state = 'ended'
    else:
        yield from paypal_captured(shop, out, checkout, pick(
            order, 'purchase_units.0.payments', dict, {}))


def paypal_capture(checkout, path, order):
    """Steps: take the money of an order that was approved; the order then.

    It can be taken once, whatever the request's id; that must be another one
    when the payer chose another card, or the old refusal comes back.
    """
    attempt = sha256(pick(order, 'update_time', str, '').encode()).hex()[:8]
    try:
        yield ('provider', 'paypal', 'POST', path + '/capture', {},
               '%s-%s' % (checkout.name, attempt))
    except ProviderError as e:
        if not 400 <= e.status < 500:
            raise
        # Somebody else was faster, or the bank said no: the order knows.
    return (yield from paypal_get(path))


def paypal_captured(shop, out, checkout, payments):
    """Steps: enter the captures and refunds of an order."""
    refunds = pick(payments, 'refunds', list, [])
    for capture in pick(payments, 'captures', list, []):
        status = pick(capture, 'status')
        paid = 'paypal-' + ident_check(pick(capture, 'id'))
        if status == 'PENDING':
            out.state = 'waiting'
        if status not in ('COMPLETED', 'PARTIALLY_REFUNDED', 'REFUNDED'):
            continue
        if not (yield from checkout_good(out, checkout, paid, *paypal_cents(
                capture, 'amount'))):
            continue
        if status != 'COMPLETED' and not refunds and paid not in (
                yield from pay_entries(checkout.account)):
            out.wrong(checkout, 'it was refunded, PayPal does not say how; '
                      'nothing is entered')
            continue
        yield from pay_enter(shop, out, checkout.account, 'payment', paid,
                             checkout.cents)
        out.state = 'paid'
        for refund in refunds:
            yield from paypal_refund(shop, out, checkout, paid, refund,
                                     'refund')


def paypal_refund(shop, out, checkout, paid, refund, kind):
    """Steps: enter a refund, or a chargeback that looks like one."""
    cents, currency = paypal_cents(refund, 'amount')
    if currency != CURRENCY:
        out.wrong(checkout, 'a refund in another currency')
        return
    name = 'paypal-' + ident_check(pick(refund, 'id'))
    if name == paid:                    # PayPal sent the capture itself
        name += '.reversed'
    failed = pick(refund, 'status', str, '') in ('FAILED', 'CANCELLED')
    yield from pay_back(shop, out, checkout, paid, kind, name, cents,
                        'failed' if failed else None)


def paypal_event(shop, out, event):
    """Steps: do what an event is about that PayPal's API gave."""
    kind = pick(event, 'event_type')
    thing = pick(event, 'resource', dict)
    if kind not in PAYPAL_EVENTS:
        return
    if kind.startswith('CHECKOUT.ORDER.'):
        yield from checkout_settle(
            shop, out, pick(thing, 'purchase_units.0.custom_id', str, ''),
            pick(thing, 'id'))
    elif kind.startswith('CUSTOMER.DISPUTE.'):
        for sold in pick(thing, 'disputed_transactions', list):
            yield from paypal_taken(
                shop, out, pick(sold, 'seller_transaction_id'))
    elif kind in ('PAYMENT.CAPTURE.REFUNDED', 'PAYMENT.CAPTURE.REVERSED'):
        yield from paypal_taken(
            shop, out, paypal_of(thing), thing,
            'refund' if kind.endswith('REFUNDED') else 'chargeback')
    else:
        yield from checkout_settle(
            shop, out, pick(thing, 'custom_id', str, ''),
            pick(thing, 'supplementary_data.related_ids.order_id', str, None))


def paypal_of(thing):
    """The id of the capture that a refund is of, or its own."""
    for link in pick(thing, 'links', list, []):
        where, _, ident = pick(link, 'href').rpartition('/')
        if pick(link, 'rel', str, '') == 'up' and (
                where.endswith('/captures')):
            return ident
    return pick(thing, 'id')


def paypal_taken(shop, out, ident, refund=None, kind=None):
    """Steps: enter a refund or chargeback, and how disputes ended, of capture
    `ident`.
    """
    capture = yield from paypal_get('/v2/payments/captures/'
                                    + ident_check(ident))
    checkout = capture and (yield from checkout_load(
        pick(capture, 'custom_id', str, '')))
    if not checkout:
        return                          # of something else that is sold
    paid = 'paypal-' + ident
    if paid not in (yield from pay_entries(checkout.account)):
        yield from checkout_settle(shop, out, checkout.name, pick(
            capture, 'supplementary_data.related_ids.order_id', str, None))
    if refund is not None:
        yield from paypal_refund(shop, out, checkout, paid, refund, kind)
    # Whoever comes second of the chargeback and the end of its dispute sees
    # both.
    if any(money.kind == 'chargeback' and money.of == paid
           for money in (yield from pay_entries(checkout.account)).values()):
        yield from paypal_disputes(shop, out, checkout, paid, ident)


def paypal_disputes(shop, out, checkout, paid, ident):
    """Steps: a chargeback whose dispute was won is money again, under the
    names of payment and dispute.
    """
    # 403: the application may not read disputes.
    found = yield from paypal_get(
        '/v1/customer/disputes?disputed_transaction_id=' + ident, (403, 404))
    disputes = []
    for one in pick(found, 'items', list, []):
        name = ident_check(pick(one, 'dispute_id'))
        dispute = yield from paypal_get('/v1/customer/disputes/' + name)
        disputes.append(paypal_dispute(dispute) if dispute
                        else (name, None, False))
    entries = yield from pay_entries(checkout.account)
    for name, cents in disputes_won(paid, entries, disputes):
        if cents is None:
            out.wrong(checkout, 'dispute %s of %s was won; what is of which '
                      'dispute is not clear, and nothing is entered'
                      % (name, paid))
        else:
            yield from pay_enter(shop, out, checkout.account, 'reversal',
                                 '%s.won.%s' % (paid, name), cents, paid)


def paypal_dispute(dispute):
    """(name, cents or None, True if it was won) of a dispute."""
    cents, currency = None, None
    if 'dispute_amount' in dispute:
        cents, currency = paypal_cents(dispute, 'dispute_amount')
    return (ident_check(pick(dispute, 'dispute_id')),
            cents if currency == CURRENCY else None,
            pick(dispute, 'dispute_outcome.outcome_code', str, '')
            in DISPUTE_WON)


def disputes_won(paid, entries, disputes):
    """[(name, cents)] of `disputes`, as paypal_dispute() has them, of which
    money of payment `paid` came back and is not in `entries` yet; None for
    cents where that is not clear.

    PayPal does not say of which dispute a chargeback is, and some disputes
    end before anything is taken: a payer may take one back, which counts as
    won, and then go to his bank.  So until all are won, of those of one amount
    as many are given back as are more than the disputes that were not won.
    """
    taken = {name: -money.amount // CENT for name, money in entries.items()
             if money.of == paid and money.kind == 'chargeback'}
    given, older = {}, collections.Counter()
    for name, money in entries.items():
        # Once the name was that of the chargeback and .won.
        old = name.rpartition('.')[0] in taken
        if money.of == paid and money.kind == 'reversal' and (
                old or name.startswith(paid + '.won.')):
            given[name] = money.amount // CENT
            older[given[name]] += old and name.endswith('.won')
    won = [one for one in sorted(disputes, key=lambda one: one[0]) if one[2]]
    fresh = [one for one in won
             if '%s.won.%s' % (paid, one[0]) not in given]
    left = sum(taken.values()) - sum(given.values())
    vague = None in [cents for _, cents, _ in disputes]
    lost = len(won) < len(disputes)
    if left <= 0 or not won:
        return []
    if len(disputes) == 1 or vague:
        # Where all are won it is no matter which it was.
        cents = None if lost or not fresh else min(
            left, left if vague else fresh[0][1])
        return [((fresh or won)[0][0], cents)]
    count, back = (collections.Counter(sums.values())
                   for sums in (taken, given))
    kept = collections.Counter(one[1] for one in disputes if not one[2])
    found = []
    for name, cents, _ in fresh:
        if older[cents] > 0:
            older[cents] -= 1
        elif count[cents] > back[cents] + kept[cents]:
            back[cents] += 1
            found.append((name, cents))
        elif count[cents] > back[cents]:
            found.append((name, None))
    return found


def paypal_verify(headers, body, webhook, now):
    """Steps: Forged unless PayPal signed a webhook's body, bytes.

    Signed is "TRANSMISSION ID|TIME|WEBHOOK ID|CRC-32 of the body", RSA with
    SHA-256 (PKCS #1 v1.5), with the key of a certificate that a server of
    PayPal gives, over TLS, which is what vouches for it.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    try:
        signature = base64.b64decode(headers['PAYPAL-TRANSMISSION-SIG'], None,
                                     True)
        text = '%s|%s|%s|%d' % (
            headers['PAYPAL-TRANSMISSION-ID'],
            headers['PAYPAL-TRANSMISSION-TIME'], webhook, zlib.crc32(body))
        url = headers['PAYPAL-CERT-URL']
        if headers['PAYPAL-AUTH-ALGO'] != 'SHA256withRSA':
            raise ValueError(headers['PAYPAL-AUTH-ALGO'])
    except (KeyError, ValueError):
        raise Forged('a webhook without a good signature') from None
    key = (yield ('provider', 'paypal', 'CERT', url, None, None))
    try:
        if not isinstance(key, rsa.RSAPublicKey):
            raise InvalidSignature
        key.verify(signature, text.encode('utf-8', 'replace'),
                   padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        raise Forged('a webhook without a good signature') from None


# Webhooks, and what they left out.


def pay_webhook(shop, out, provider, headers, body):
    """Steps: do what a webhook is about; `headers` by upper-case name with
    hyphens, `body` bytes as they came.

    Forged if the provider did not send it: say 400.  Any other error if it
    could not be done now: say 503, and it comes again.
    """
    now = yield ('now',)
    if provider == 'stripe':
        stripe_verify(headers.get('STRIPE-SIGNATURE', ''), body,
                      shop.secrets, now)
    else:
        yield from paypal_verify(headers, body, shop.webhook, now)
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        raise Forged('a webhook that is not JSON') from None
    if provider == 'stripe':
        yield from stripe_event(shop, out, event)
        return
    # What it says is what the API says, which is given to us alone.
    event = yield from paypal_get('/v1/notifications/webhooks-events/'
                                  + ident_check(pick(event, 'id')))
    if event is not None:
        yield from paypal_event(shop, out, event)


def pay_reconcile(shop, out):
    """Steps: find what webhooks left out: all checkouts that are due are read
    at their providers, and all events since the last time.

    One that cannot be read now does not hold up the others.
    """
    now = yield ('now',)
    for key in (yield ('list', 'checkout/due/')):
        name = key.rpartition('/')[2]
        yield from tried(out, 'checkout ' + name,
                         due_settle(shop, out, name, now))
    for provider in sorted(shop.providers):
        yield from tried(out, provider, events_read(shop, out, provider, now))


def tried(out, what, steps):
    """Steps: True if `steps` got to their end; what stops them is said."""
    try:
        yield from steps
        return True
    except (StoreError, ProviderError, ServerError) as e:
        out.differs.append('%s: %s' % (what, e))
        return False


def due_settle(shop, out, name, now):
    """Steps: settle a checkout, if there ever was one."""
    yield from checkout_settle(shop, out, name)
    if out.state == 'unknown':          # who wrote it down got no further
        due = yield from summed_get(checkout_due(name))
        if due and due['time'] + CHECKOUT_DAYS * DAY < now:
            yield ('delete', checkout_due(name))


def events_read(shop, out, provider, now):
    """Steps: do what the events of a provider are about, the oldest first,
    and remember how far that is.
    """
    prefix = 'checkout/seen/%s/' % provider
    seen = yield from versioned_get(prefix)
    since = max(now - EVENT_DAYS * DAY + 3600,
                seen[1]['until'] - EVENT_OVERLAP if seen else 0)
    if provider == 'stripe':
        events = yield from stripe_list('/v1/events?created[gte]=%d%s' % (
            since, ''.join('&types[]=' + kind for kind in STRIPE_EVENTS)))
    else:
        events = yield from paypal_list(since, now)
    done, out.again = True, False
    one = stripe_event if provider == 'stripe' else paypal_event
    for event in reversed(events):
        done &= yield from tried(out, 'event of ' + provider,
                                 one(shop, out, event))
    if done and not out.again:
        old = yield ('list', prefix)
        yield from versioned_put(prefix, seen[0] + 1 if seen else 0,
                                 {'until': now})
        for key in old:
            yield ('delete', key)


def paypal_list(since, now):
    """Steps: all events between two times, the newest first."""
    form = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(since)), \
        time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(now))
    path = ('/v1/notifications/webhooks-events?page_size=100&start_time=%s'
            '&end_time=%s' % form)
    found = []
    while path:
        page = yield from paypal_get(path)
        found += pick(page, 'events', list, [])
        list_check(found)
        path = None
        for link in pick(page, 'links', list, []):
            if pick(link, 'rel', str, '') == 'next':
                # Of its host nothing is believed.
                href = pick(link, 'href')
                path = href[href.index('/v1/'):] if '/v1/' in href else None
    return found


##############################################################################
# Export
#
# What is held about a person, for that person.  All are steps.
##############################################################################


def account_export(ident):
    """Steps: all that is kept of an account but the log and the blocks of its
    machines, as a dict of JSON values.  What would let its reader log in is
    left out.
    """
    versions = yield from versions_all(account_prefix(ident))
    machines = yield from export_machines(ident)
    mails = [mail for _, mail, _ in (yield from mail_list())
             if mail['account'] == ident]
    for mail in mails:
        mail.get('values', {}).pop('link', None)
    money = []
    for place in ('pay', 'adjust'):
        for key in (yield ('list', '%s/%s/' % (place, ident))):
            money.append(money_decode(key, (yield ('get', key, 0, None)))
                         ._asdict())
    return {
        'account': [{name: value for name, value in version.items()
                     if name not in ('salt', 'stored')}
                    for version in versions],
        'machines': machines, 'mails': mails, 'money': money,
        'checkouts': (yield from export_checkouts(ident)),
        'sessions': (yield from export_sessions(ident)),
        'usage': (yield from export_usage(ident, machines)),
        'standing': (yield from versions_all(standing_prefix(ident)))}


def export_checkouts(ident):
    """Steps: payments that an account's owner has begun."""
    found = []
    for key in (yield ('list', 'checkout/asked/%s/' % ident)):
        checkout = yield from checkout_load('%s-%s' % (
            ident, key.rpartition('/')[2]))
        if checkout:
            found.append(checkout._asdict())
    return found


def export_sessions(ident):
    """Steps: who was logged in on the web, and has not logged out."""
    found = []
    for key in (yield ('list', 'session/%s/' % ident)):
        session = yield from summed_get(key)
        if session:
            found.append({name: session[name] for name in (
                'time', 'until', 'agent', 'address')})
    return found


def versions_all(prefix):
    """Steps: every version under `prefix`, the oldest first."""
    found = []
    for key in reversed((yield ('list', prefix))):
        found.append(versioned_decode(key, (yield ('get', key, 0, None))))
    return found


def export_machines(ident):
    """Steps: machines that are or were an account's; of the latter only when
    they became its.  `erased` is when and why all that one stored was, None
    if it was not.
    """
    keys = yield ('list', 'owner/')
    found = []
    for number in sorted({key.split('/')[1] for key in keys}):
        owners = yield from versions_all('owner/%s/' % number)
        since = [x['time'] for x in owners if x['account'] == ident]
        if not since:
            continue
        one = {'number': number, 'ours': owners[-1]['account'] == ident,
               'since': since}
        if one['ours']:
            one['versions'] = yield from versions_all('machine/%s/' % number)
            erased = (yield from catch_up(int(number, 16))).erased
            one['erased'] = erased and erased._asdict()
        found.append(one)
    return found


def export_usage(ident, machines):
    """Steps: what was charged to an account, a dict for a machine and day."""
    shards, found = {machine['number'][0] for machine in machines}, []
    for key in (yield ('list', 'usage/')):
        _, day, shard = key.split('/')
        if shard not in shards:
            continue
        usage = yield from usage_get(day_parse(day), shard)
        for machine, row in usage.rows.items():
            if row.account == ident:
                found.append({
                    'day': day, 'machine': machine, 'stored': row.stored,
                    'up': row.up, 'down': row.down,
                    'amount': sum(usage.amounts(machine))})
    return found


##############################################################################
# Session
#
# One connection: who it is, what it may do, its transaction.  Does no I/O (see
# the top of the file): every request is a generator of wishes, one running at
# a time; only PUT, WITHDRAW and DELETE are plain calls, because they come by
# the ten thousand and only fill the batch that flush() writes.
##############################################################################


class Transaction:
    """What a transaction holds since it began or was last checkpointed."""

    __slots__ = ('tid', 'kind', 'lineage', 'spool', 'segments', 'revived',
                 'n', 'blocks', 'listed', 'began')

    def __init__(self, tid, kind, lineage, spool):
        self.tid = tid
        self.kind = kind
        self.lineage = lineage
        self.spool = spool          # its open segment, and all that is large
        self.segments = []          # closed, in the store, not committed
        self.revived = {}           # name -> (class, stored length)
        self.n = 0                  # its base
        self.blocks = 0             # live ones, when last counted
        self.listed = 0             # names in all DELETEs or WITHDRAWs
        self.began = 0              # when, by BEGIN on this connection


# One table, looked at in one place: the method, who may ask (letters of roles,
# any of them; none for everybody) and whether it writes to the store.
REQUESTS = {
    HELLO: ('_hello', '', False),
    REGISTER1: ('_register1', '', False),
    REGISTER2: ('_register2', '', True),
    AUTH: ('_auth', '', False),
    STAT: ('_stat', 'rwdn', False),
    CHANGES: ('_changes', 'rwdn', False),
    LIST: ('_list', 'rwd', False),
    GET: ('_get', 'rwd', False),
    HAS: ('_has', 'w', False),
    BEGIN: ('_begin', 'wd', True),
    PUT: (None, 'w', True),
    WITHDRAW: (None, 'w', True),
    DELETE: (None, 'd', True),
    REVIVE: ('_revive', 'd', True),
    ACCOUNT: ('_account', 'rwdn', False),
    CHECKPOINT: ('_commit', 'w', True),
    COMMIT: ('_commit', 'wd', True),
    ABORT: ('_abort', 'wd', True),
    NUKE: ('_commit', 'n', True),
}
UNANSWERED = (PUT, WITHDRAW, DELETE)

# What a frame may commit.
COMMIT_KINDS = {CHECKPOINT: (KIND_WRITE,), NUKE: (KIND_NUKE,),
                COMMIT: (KIND_WRITE, KIND_DELETE, KIND_ABORT, KIND_UNDELETE)}

AUTH_HEAD = struct.Struct('>HQB')
BEGIN_HEAD = struct.Struct('>B16s16sQ32sB')
ARCHIVE_ROW = struct.Struct('>32s32s16sBQ')


def many(kind, rows):
    """Steps: answer encoded `rows` in as many frames as they need."""
    rows = iter(rows)
    while True:
        part = list(itertools.islice(rows, CEILING['names']))
        if not part:
            return
        yield ('answer', kind, U16.pack(len(part)) + b''.join(part))


def log_put(entry):
    """Steps: True if `entry` is entry k of the log, durably; else another is.

    A put that failed may have succeeded: it is tried once more, and what is
    there then is compared.
    """
    key, data = log_key(entry.machine, entry.k), log_encode(entry)
    try:
        created = yield ('put', key, data)
    except StoreError:
        created = yield ('put', key, data)
    return created or (yield ('get', key, 0, None)) == data


def droppable(machine, k, keys):
    """Steps: those of a transaction's segments that the log up to entry k
    does not know.
    """
    if not keys:
        return []
    prefix = keys[0].rpartition('/')[0] + '/'
    known = dict((yield ('index', machine, 'at', k, 'segments_of', prefix)))
    return [key for key in keys if key not in known]


def log_drop(machine, keys):
    """Steps: the log says that nothing may use a transaction's segments
    `keys`, and only then they may be deleted: those it says so of."""
    while True:
        state = yield from catch_up(machine)
        keys = yield from droppable(machine, state.k, keys)
        if not keys:
            return []
        entry = yield from log_next(machine, state)
        entry.drops = keys
        if (yield from log_put(entry)):
            return keys


def log_whole(state):
    """Refused if something of the log or its segments is lost.

    What is written on top of an index that does not know all that is live
    would be wrong for whoever does.
    """
    if state.lost:
        raise Refused(E_READONLY, 'a part of what is stored cannot be read: '
                      'archives can be read, not stored or deleted, until it '
                      'is repaired (%s)' % state.lost)


def log_next(machine, state):
    """Steps: an Entry to follow `state` that changes no total."""
    log_whole(state)
    now = yield ('now',)
    entry = Entry(machine, state.k + 1, state.log_hash, max(now, state.time))
    entry.blocks, entry.bytes = state.blocks, state.bytes
    return entry


def erased_check(state):
    """The State; Refused if the operator deleted all that the machine had."""
    if state.erased:
        raise Refused(E_NOMACHINE, 'all that this machine stored was deleted '
                      'on %s: %s' % (day_text(state.erased.time // DAY),
                                     state.erased.reason))
    return state


def range_plan(places):
    """How to read blocks: [(key, start, end, members)].

    `places` are (key, offset, length, class) or None; `members` are indices
    into it.  Blocks near each other are read at once.
    """
    plan = []
    order = sorted((i for i in range(len(places)) if places[i]),
                   key=lambda i: places[i][:2])
    for i in order:
        key, offset, length, _ = places[i]
        if plan:
            last_key, start, end, members = plan[-1]
            if (key == last_key and offset <= end + LIMIT['read gap']
                    and offset + length - start <= LIMIT['read']):
                plan[-1] = (key, start, max(end, offset + length), members)
                members.append(i)
                continue
        plan.append((key, offset, offset + length, [i]))
    return plan


def read_end(places, start, most):
    """How far one may go from `start` to read at most `most` bytes, but one
    block in any case.
    """
    end, size = start, 0
    while end < len(places):
        size += places[end][2] if places[end] else 0
        if size > most and end > start:
            break
        end += 1
    return end


def block_rotten(name, place):
    """Steps: what is wrong with a stored block, in words, or None.

    `place` is as Index.find() tells it.  Held against the checksum before it.
    """
    key, offset, length, _ = place
    try:
        data = yield ('get', key, offset - ENTRY.size, ENTRY.size + length)
    except LOST as e:
        return str(e)
    row = entry_row(data, 0, 0)
    if row and row.startswith(name) and ROW.unpack(row)[3] == length:
        return None
    return 'read segment %s: block %s at %d is damaged' % (key, name.hex(),
                                                           offset)


class Session:
    """One connection's side of the protocol, without I/O.

    A driver runs open(), then for each frame either accept() or handle(),
    flush() when the client has nothing more to give, and end() at the end.
    It stops reading when `over` is set, and after the answers are out hangs
    up.
    """

    def __init__(self, server, transport, machine=None, roles=None,
                 address=None):
        self.server = server            # Server
        self.transport = transport
        self.only_machine = machine     # number, or None for any
        self.only_roles = roles         # letters, or None for all
        self.statement = b''            # body of the first frame
        self.nonce = b''
        self.address = address          # of the client, None: unknown
        self.register1 = None           # (body, user, known?, account)
        self.logins = 0                 # wrong passwords
        self.challenges = 0
        self.machine = None             # Machine, since the first AUTH
        self.genesis = b''              # its H_0
        self.roles = ''                 # letters proven
        self.heard = 0                  # when the machine was last looked at
        self.over = False               # say no more, hang up
        self.tx = None                  # Transaction
        self.busy = False               # tx is in use by running steps
        self.unsaid = False             # tx was taken; to be said by idle()
        self.batch = []                 # entries not yet in the spool
        self.batch_bytes = 0
        self.writing = 0                # bytes of the batch being written
        self.reading = 0                # bytes of blocks being read
        self.arrived = 0                # puts and the like since BEGIN
        self.quotas = []                # Quotas that hold for tx
        self.arrived_bytes = 0          # of blocks, since these were measured
        self.measured = 0               # when they were
        self.rotten = set()             # names whose stored copy is damaged
        self.paid = 0                   # until when it may write and read
        self.figures = 0, b''           # until when these are the answer

    @property
    def ceiling(self):
        """Longest body allowed now."""
        return CEILING['frame' if self.machine else 'frame before auth']

    @property
    def cert_hash(self):
        return (self.server.cert_hash if self.transport == TRANSPORT_TLS
                else ZERO32)

    # What a driver calls.

    def open(self):
        """Steps: the server's first frame."""
        self.nonce = yield ('random', 32)
        server = self.server
        self.statement = (
            U16.pack(PROTOCOL) + server.identity_public + server.store_id
            + U64.pack(server.serial) + self.nonce
            + server.vouch(self.cert_hash))
        yield ('answer', STATEMENT, self.statement, 0)

    def accept(self, kind, body):
        """Take a PUT, WITHDRAW or DELETE into the batch.

        None, or the body of an ERROR frame.
        """
        try:
            self._allowed(kind)
            self._take(kind, body)
        except Refused as e:
            self.over = self.over or e.code == E_BAD
            return error_body(e.code, str(e))
        return None

    def handle(self, kind, body):
        """Steps: answer any other request."""
        try:
            method = self._allowed(kind)
            yield from self._thaw(kind)
            yield from (method(kind, body) if kind in COMMIT_KINDS
                        else method(body))
        except Refused as e:
            self.over = self.over or e.code == E_BAD
            yield ('answer', ERROR, error_body(e.code, str(e)))
        except (StoreError, OSError) as e:
            yield ('log', str(e))
            yield ('answer', ERROR, error_body(E_INTERNAL, str(e)))
        finally:
            self.reading = 0

    def idle(self):
        """Steps: the client waits; write what is in the batch."""
        if self.unsaid:
            self.unsaid = False
            yield ('answer', ERROR, error_body(
                E_EXPIRED, 'the transaction was taken over'), 0)
        try:
            yield from self.flush()
        except Refused as e:
            self.over = self.over or e.code == E_BAD
            yield ('answer', ERROR, error_body(e.code, str(e)), 0)
        except (StoreError, OSError) as e:
            yield ('log', str(e))
            yield ('answer', ERROR, error_body(E_INTERNAL, str(e)), 0)

    def flush(self):
        """Steps: write the batch to the spool and say RECEIVED.

        What has been received survives the death of this process.  After an
        error, or where it can never be committed, the transaction is let go;
        BEGIN finds what is left of it.
        """
        while self.batch:
            batch, self.batch = self.batch, []
            self.writing, self.batch_bytes = self.batch_bytes, 0
            arrived, tx = self.arrived, self.tx
            self.busy = True
            try:
                yield from self._check_listed(tx)
                yield ('spool', tx.spool, 'append', batch)
                if self._segment_full(tx.spool):
                    yield from self._segment_close(tx)
                    yield from self._measure_again()
            except (StoreError, Refused):
                if self.tx:
                    yield from self._leave()
                raise
            finally:
                self.busy, self.writing = False, 0
            yield ('answer', RECEIVED, U64.pack(arrived), 0)

    def end(self):
        """Steps: the connection is gone; what arrived stays in the spool."""
        try:
            yield from self.flush()
        except (StoreError, OSError) as e:
            yield ('log', str(e))
        if self.tx:
            yield from self._leave()

    def expire(self):
        """Give up the transaction to another connection; its Spool."""
        assert not self.busy
        spool = self.tx.spool
        self.unsaid = True
        self._forget()
        return spool

    # Who is there.

    def _allowed(self, kind):
        """The method for a request, if this connection may ask it."""
        if kind not in REQUESTS:
            raise Refused(E_BAD, 'unknown request %d' % kind)
        method, letters, writes = REQUESTS[kind]
        if letters and not set(letters) & set(self.roles):
            raise Refused(E_ROLE, 'this request needs the role %s'
                          % ' or '.join(letters))
        if writes and self.server.read_only:
            raise Refused(E_READONLY, 'the store is read-only')
        if writes and self.server.frozen:
            raise Refused(E_READONLY, 'the server is read-only for now: '
                          'archives can be read, not stored or deleted')
        return getattr(self, method) if method else None

    def _need(self, role):
        if ROLE_LETTER[role] not in self.roles:
            raise Refused(E_ROLE, 'this request needs the role %s'
                          % ROLE_LETTER[role])

    def _hello(self, body):
        reader = Reader(body)
        version = reader.u16()
        reader.end()
        if version < 1:
            raise Refused(E_BAD, 'no such protocol version')
        yield ('answer', OK, U16.pack(min(version, PROTOCOL)))

    def _register1(self, body):
        reader = Reader(body)
        reader.take(32)
        try:
            user = reader.take(reader.u8()).decode('utf-8')
        except UnicodeDecodeError:
            raise Refused(E_BAD, 'user name is not UTF-8') from None
        reader.end()
        self.challenges += 1
        if self.challenges > LIMIT['challenges']:
            raise Refused(E_BAD, 'too many challenges on one connection')
        # Any number of them would tell small differences in time.
        if not self._trusted() and not self.server.read_only:
            seconds = yield ('guess', 'ask', self.address, (yield ('now',)))
            if seconds:
                raise Refused(E_BUSY, 'too many challenges; try again in %d '
                              'seconds' % seconds)
        known, account = yield from account_login(user, self.server.secret)
        self.register1 = (body, user, known, account)
        yield ('answer', CHALLENGE, bytes.fromhex(account['salt'])
               + struct.pack('>BII', account['logN'], account['r'],
                             account['p']))

    def _register2(self, body):
        reader = Reader(body)
        name = reader.take(reader.u8()).decode('utf-8', 'replace')
        keys = reader.take(4 * 32)
        signed = body[:reader.pos]
        proof = reader.take(32)
        reader.end()
        challenge = self.register1 or (b'', '', False, account_made_up(
            '', self.server.secret))
        self.register1 = None           # one try for each challenge
        user = challenge[1]
        if not (user == '' and proof == ZERO32 and self._trusted()):
            yield from self._login(*challenge, signed, proof)
        number = yield from machine_create(user, name, keys,
                                           self.server.delete_delay)
        yield ('answer', REGISTERED, U64.pack(number) + self.server.store_id)

    def _trusted(self):
        """True where whoever is there could write to the files anyway."""
        return self.transport == TRANSPORT_DIR or (
            self.transport == TRANSPORT_STDIO and self.only_machine is None)

    def _login(self, first, user, known, account, signed, proof):
        """Steps: Refused unless the proof is right, and there may be one.

        Whoever is known or not, and right or wrong, the work is the same.
        """
        now = yield ('now',)
        seconds = yield ('guess', 'charge', self.address, user, now)
        if seconds:
            raise Refused(E_BUSY, 'too many wrong passwords; try again in %d '
                          'seconds' % seconds)
        good = login_check(bytes.fromhex(account['stored']),
                           self.statement + first + signed, proof)
        if not (known and good):
            self.logins += 1
            self.over = self.logins >= LIMIT['logins']
            raise Refused(E_LOGIN, 'unknown user or wrong password')
        seconds = yield ('guess', 'forgive', self.address, user, now)
        if seconds:
            raise Refused(E_BUSY, 'too many machines were registered; try '
                          'again in %d seconds' % seconds)

    def _check_funds(self):
        """Steps: Refused where there is no money for writing and reading;
        asked once a minute, and each time while there is none.

        A ledger that cannot be read keeps nobody from a backup.
        """
        if self.server.amnesty or not any(self.server.prices or ()):
            return
        now = yield ('now',)
        if not now < self.paid <= now + LIMIT['seconds paid']:
            try:
                balance = yield from funds_missing(self.machine.number)
            except StoreError as e:
                yield ('log', str(e))
                balance = None
            if balance is not None:
                raise Refused(
                    E_FUNDS, 'the balance of the account is %s dollars: '
                    'archives can be deleted, and stored and read again as '
                    'soon as money is added' % money_text(balance.money))
            self.paid = now + LIMIT['seconds paid']

    def _check_reading(self, names):
        """Steps: _check_funds() for blocks that are not all records: with
        these one lists archives.
        """
        try:
            yield from self._check_funds()
        except Refused:
            places = yield self._ask('find', names)
            if not all(place and place[3] == RECORD for place in places):
                raise

    def _check_frozen(self, machine, letters):
        """Refused if one of these roles was frozen.

        Who could write to the files anyway is let in: so the owner brings
        back what a thief deleted, while the thief is kept out.
        """
        frozen = set(machine.frozen) & set(letters)
        if frozen and not self._trusted():
            raise Refused(E_ROLE, 'the operator has frozen the role %s of '
                          'this machine' % min(frozen))

    def _thaw(self, kind):
        """Steps: hear of a frozen role, at every BEGIN and commit and at
        all else every few seconds.
        """
        if self.machine is None:
            return
        now = yield ('now',)
        if (kind in COMMIT_KINDS or kind == BEGIN
                or now >= self.heard + LIMIT['seconds to freeze']):
            self.heard = now
            self.machine = yield from machine_load(self.machine.number)
            self._check_frozen(self.machine, self.roles)

    def _auth(self, body):
        reader = Reader(body)
        version, number, role = AUTH_HEAD.unpack(reader.take(AUTH_HEAD.size))
        nonce, signature = reader.take(32), reader.take(64)
        reader.end()
        if version != PROTOCOL or role not in ROLE_LETTER:
            raise Refused(E_BAD, 'unknown version or role')
        if self.machine and self.machine.number != number:
            raise Refused(E_BAD, 'one connection, one machine')
        letter = ROLE_LETTER[role]
        if self.only_machine not in (None, number) or (
                self.only_roles is not None
                and letter not in self.only_roles):
            raise Refused(E_ROLE, 'not allowed on this connection')
        yield from self._check_strange()
        machine = yield from machine_load(number)
        if machine is None:
            yield from self._check_strange(True)
            raise Refused(E_NOMACHINE, 'no such machine')
        self._check_frozen(machine, letter)
        signed = (b'tarsnap-auth-1\0' + U16.pack(PROTOCOL)
                  + bytes([self.transport]) + self.server.store_id
                  + self.cert_hash + U64.pack(number) + bytes([role])
                  + self.nonce + nonce)
        if not verify(machine.key(role), signature, signed):
            yield from self._check_strange(True)
            raise Refused(E_ROLE, 'not the machine\'s key for this role')
        state = erased_check((yield from catch_up(number)))
        self.machine = machine
        self.genesis = genesis(number, self.server.store_id, machine.keys)
        self.roles += letter
        yield ('answer', AUTHOK, self._head(state)
               + U64.pack(state.archives) + bytes([
                   bool(self.server.read_only or self.server.frozen
                        or machine.read_only or state.lost)
                   | bool(self.server.prices) << 1]))

    def _check_strange(self, wrong=False):
        """Steps: Refused for an address that has named too many machines in
        vain; with `wrong` it is told of one more.
        """
        if self.machine or not self.address:
            return
        strange, now = self.server.strange, (yield ('now',))
        if wrong:
            strange.wrong(self.address, now)
        elif strange.wait(self.address, now):
            self.over = True
            raise Refused(E_BUSY, 'too many wrong keys; try again in %d '
                          'seconds' % strange.wait(self.address, now))

    # Looking.

    def _head(self, state):
        return U64.pack(state.n) + (state.head or self.genesis)

    def _current(self):
        """Steps: the State now, with what other processes have done."""
        return erased_check((yield from catch_up(self.machine.number)))

    def _ask(self, method, *args):
        """A wish to the index of this machine."""
        return ('index', self.machine.number, method) + args

    def _stat(self, body):
        Reader(body).end()
        state = yield from self._current()
        now = yield ('now',)
        yield ('answer', STATUS, self._head(state) + struct.pack(
            '>QQQI', state.archives, state.blocks, state.bytes,
            delete_delay(self.machine.delays, now)))

    def _account(self, body):
        reader = Reader(body)
        flags = reader.u8()
        reader.end()
        state, now = (yield from self._current()), (yield ('now',))
        # What takes so many requests to the store is not done twice at once.
        if not flags & 1 or now >= self.figures[0]:
            lines = yield from machine_figures(
                self.machine.number, state.bytes, self.server.prices,
                self.server.amnesty, flags & 1, self.roles != 'w')
            body = b''.join(b'%s %s\n' % (name.encode(), str(value).encode())
                            for name, value in lines)
            if not flags & 1:
                yield ('answer', FIGURES, body)
                return
            self.figures = now + FIGURES_SECONDS, body
        yield ('answer', FIGURES, self.figures[1])

    def _known(self, state, n, head):
        """Steps: Refused unless commit n here has hash `head`."""
        here = None
        if n == 0:
            here = self.genesis
        elif n <= state.n:
            found = yield self._ask('commit_at', n)
            here = found and found[0]
        if here != head:
            raise Refused(E_RESYNC, 'commit %d is not known here' % n)

    def _changes(self, body):
        reader = Reader(body)
        n, head, flags = reader.u64(), reader.take(32), reader.u8()
        reader.end()
        state = yield from self._current()
        if head != ZERO32 or n > state.n:
            yield from self._known(state, n, head)
        for number in range(n + 1, state.n + 1):
            yield from self._change_answer(number, flags & 1)
        yield ('answer', OK, b'')

    def _change_answer(self, n, lists):
        """Steps: one commit, with its lists of names if asked."""
        entry = yield from self._entry(n)
        yield ('answer', COMMIT_OBJECT, U64.pack(entry.time) + entry.commit)
        if lists:
            yield from self._tell(
                sum(segment[3] for segment in entry.segments),
                self._change_lists(n, entry))

    def _tell(self, rows, steps):
        """Steps: carry out `steps`, which hold so many rows in memory while
        they answer; where these are many, a few at once for a machine.
        """
        table, number = self.server.telling, self.machine.number
        if rows <= LIMIT['rows told']:
            yield from steps
            return
        while table[number] >= LIMIT['long answers']:
            yield ('wait', 0.5)
        table[number] += 1
        try:
            yield from steps
        finally:
            table[number] -= 1
            if not table[number]:
                del table[number]

    def _change_lists(self, n, entry):
        """Steps: the lists of names of a commit."""
        try:
            (tables, withdrawn, deleted,
             revived) = yield from self._lists(entry)
        except (NoObject, Damaged) as e:
            yield ('log', str(e))
            raise Refused(E_NOBLOCK, 'the lists of commit %d are lost: %s'
                          % (n, e)) from None
        yield from many(ADDED, (ADDED_ROW.pack(*row) for row in (
            itertools.chain(revived, (put[2:] for put in linked_puts(
                tables, withdrawn))))))
        yield from many(REMOVED, sorted(deleted))

    @staticmethod
    def _lists(entry):
        """Steps: (tables, withdrawn, deleted names, revived rows of ADDED)
        of a log entry.
        """
        tables, withdrawn, deleted, revived, rows = [], {}, set(), [], 0
        for key, size, digest, count, _ in entry.segments:
            table, lists = yield from segment_past(key, size, digest, count)
            for i, cls, names in lists:
                if cls == WITHDRAWN_LIST:
                    withdrawn.update(dict.fromkeys(names, rows + i + 1))
                elif cls == REVIVED_LIST:
                    revived += names
                else:
                    deleted.update(names)
            tables.append(table)
            rows += count
        return tables, withdrawn, deleted, revived

    def _entry(self, n):
        """Steps: the log Entry that holds commit n."""
        found = yield self._ask('commit_at', n)
        if found is None:
            raise Refused(E_NOBLOCK, 'commit %d is lost' % n)
        head, k, _ = found
        number = self.machine.number
        key = log_key(number, k)
        try:
            entry = log_decode(number, k, (yield ('get', key, 0, None)))
            if sha256(entry.commit) != head:
                raise Damaged('read log entry', key, 'holds another commit')
        except LOST as e:
            # The index has seen it when it was whole.
            yield ('log', str(e))
            entry = log_decode(number, k, (yield self._ask('log_entry', k)))
        return entry

    def _list(self, body):
        reader = Reader(body)
        ids = reader.names()
        reader.end()
        if not ids and not set('rd') & set(self.roles):
            raise Refused(E_ROLE, 'the write role may only ask for '
                          'archives it names')
        state = yield from self._current()
        if state.n:
            entry = yield from self._entry(state.n)
            yield ('answer', COMMIT_OBJECT,
                   U64.pack(entry.time) + entry.commit)
        yield from self._tell(0 if ids else state.archives,
                              self._list_rows(ids))
        yield ('answer', OK, b'')

    def _list_rows(self, ids):
        """Steps: the archives of these ids, or all."""
        rows = yield self._ask('archives', ids or None)
        yield from many(ARCHIVES, (ARCHIVE_ROW.pack(*row) for row in rows))

    def _has(self, body):
        reader = Reader(body)
        names = reader.names()
        reader.end()
        yield from self._current()
        live = yield self._ask('live', names)
        yield ('answer', BITMAP, bitmap_of([n in live for n in names]))

    def _get(self, body):
        reader = Reader(body)
        mask, names = reader.u8(), reader.names()
        reader.end()
        if mask not in (0, 1, 3, 5):
            raise Refused(E_BAD, 'unknown mask %d' % mask)
        if mask == 1 and not set('rd') & set(self.roles):
            self._need(ROLE_READ)
        if mask == 3:
            self._need(ROLE_READ)
            yield from self._check_reading(names)
        if mask == 5:
            self._need(ROLE_DELETE)
        for i in range(0, len(names), 256):
            if mask == 0:
                yield from self._look_some(names[i:i + 256])
            else:
                yield from self._get_some(names[i:i + 256], mask)
        yield ('answer', OK, b'')

    def _look_some(self, names):
        """Steps: for each name nothing but whether its block is whole.

        What is not may be put again in this session: see check_puts().
        """
        state = yield from self._current()
        places = yield self._ask('find', names)
        for name, place in zip(names, places):
            if place:
                wrong = yield from block_rotten(name, place)
            else:
                wrong = self._no_block(state.lost)
            if wrong is None:
                yield ('answer', BLOCK, name)
                continue
            if place:
                self.rotten.add(name)
                yield ('log', 'machine %016x: %s' % (self.machine.number,
                                                     wrong))
            yield ('answer', ERROR, error_body(E_NOBLOCK, wrong))

    @staticmethod
    def _no_block(lost):
        return ('no such block, or it is lost with %s' % lost if lost
                else 'no such block')

    def _get_some(self, names, mask):
        places, lost = (yield self._ask('find', names)), None
        if None in places:
            state = yield from self._current()
            places = yield self._ask('at', state.k, 'find', names)
            lost = state.lost
        if None in places and mask == 5:
            kept = yield self._ask('find', names, 'kept')
            places = [a or b for a, b in zip(places, kept)]
        start = 0
        while start < len(names):
            self.reading = yield ('room',)
            end = read_end(places, start, self.reading)
            blocks = yield from self._read(names[start:end],
                                           places[start:end], lost)
            for name, block in zip(names[start:end], blocks):
                answer = self._block_answer(name, block, mask)
                if self.server.prices and answer[1] == BLOCK:
                    yield ('sent', self.machine.number, len(answer[2]))
                yield answer
            start, blocks, answer, self.reading = end, None, None, 0

    def _read(self, names, places, lost):
        """Steps: for each name (class, block), or the error in its place."""
        out = [Refused(E_NOBLOCK, self._no_block(lost))] * len(names)
        for key, start, end, members in range_plan(places):
            try:
                data = memoryview((yield ('get', key, start, end - start)))
            except StoreError:
                data = None
            for i in members:
                _, offset, length, cls = places[i]
                if data is None:
                    out[i] = yield from self._read_again(names[i], places[i])
                else:
                    offset -= start
                    out[i] = (cls, data[offset:offset + length])
        return out

    def _read_again(self, name, before):
        """Steps: look once more, with what others did meanwhile, and again
        if it was moved.

        Only then is a segment that cannot be read called damaged.
        """
        while True:
            state = yield from self._current()
            place = (yield self._ask('at', state.k, 'find', [name]))[0]
            if place is None:
                return Refused(E_NOBLOCK, 'the block was deleted meanwhile')
            try:
                return place[3], (yield ('get',) + place[:3])
            except StoreError as e:
                if isinstance(e, NoObject) and place != before:
                    before = place
                    continue
                yield ('log', str(e))
                lost = isinstance(e, (NoObject, Damaged))
                return Refused(E_NOBLOCK if lost else E_INTERNAL, str(e))

    @staticmethod
    def _block_answer(name, found, mask):
        try:
            if isinstance(found, Refused):
                raise found
            cls, block = found
            if mask != 3 and cls == CHUNK:
                raise Refused(E_ROLE, 'a chunk has no refs view')
            if mask != 3:
                block = block[:block_check(cls, block)]
        except Refused as e:
            code = E_NOBLOCK if e.code == E_BAD else e.code
            return ('answer', ERROR, error_body(code, str(e)))
        return ('answer', BLOCK, name + block)

    # Transactions.

    def _begin(self, body):
        reader = Reader(body)
        kind, tid, lineage, n, head, count = BEGIN_HEAD.unpack(
            reader.take(BEGIN_HEAD.size))
        if kind not in (KIND_WRITE, KIND_DELETE) or count > 2:
            raise Refused(E_BAD, 'BEGIN of unknown kind')
        if tid.startswith(CLEANER):
            raise Refused(E_BAD, 'this transaction id is the server\'s own')
        ids = [reader.take(32) for _ in range(count)]
        reader.end()
        self._need(KIND_ROLE[kind])
        if kind == KIND_WRITE and self.machine.read_only:
            raise Refused(E_READONLY, 'this machine is read-only: archives '
                          'can be read and deleted, not stored')
        if kind == KIND_WRITE:
            yield from self._check_funds()
        if self.tx and self.tx.tid != tid:
            raise Refused(E_BUSY, 'this connection has another transaction')
        state = yield from self._current()
        yield from self._known(state, n, head)
        log_whole(state)
        if ids and (yield self._ask('archives', ids)):
            raise Refused(E_EXISTS, 'an archive of this name exists')
        yield from self._open(tid, kind, lineage)
        self.tx.n, self.tx.blocks = n, state.blocks
        self.tx.began = yield ('now',)
        yield from self._measure()
        spool = self.tx.spool
        count, digest = yield ('spool', spool, 'puts_digest')
        yield ('answer', BEGUN, self._head(state)
               + U64.pack(count) + digest)
        puts = spool.puts()
        while True:
            rows = yield ('spool', spool, 'puts_some', puts)
            if not rows:
                break
            yield from many(ADDED, rows)
        yield ('answer', OK, b'')

    def _measure(self):
        """Steps: learn how much more may be put."""
        found, self.measured = [], (yield ('now',))
        if self.tx.kind == KIND_WRITE:
            found = yield from quotas(self.machine)
        self.quotas, self.arrived_bytes = found, self.batch_bytes

    def _measure_again(self):
        """Steps: learn what others have put meanwhile, now and then: many
        that began together could fill a quota each.
        """
        if self.quotas and (yield ('now',)) >= (
                self.measured + LIMIT['seconds measured']):
            try:
                yield from self._measure()
            except StoreError as e:     # the commit will ask again
                yield ('log', str(e))

    def _place(self, tid):
        """The key of a transaction in the table of open ones."""
        return (self.machine.number, tid)

    def _open(self, tid, kind, lineage):
        """Steps: take transaction `tid`, from whoever has it."""
        if self.tx:
            yield from self.flush()
            yield from self._leave()
        table, place = self.server.open, self._place(tid)
        while place in table and table[place].busy:
            yield ('wait', 0.05)
        # Within a process this table decides, since a process's locks do not
        # exclude itself; so the place is taken before anything is opened.
        other, table[place] = table.get(place), self
        self.busy, self.batch, self.arrived = True, [], 0
        try:
            if other:
                yield ('spool', other.expire(), 'close')
            spool = yield from self._spool(tid)
            try:
                self.tx = yield from self._adopt(tid, kind, lineage, spool)
            except (StoreError, Refused):
                yield ('spool', spool, 'close')
                raise
        except (StoreError, Refused):
            self._unreserve(tid)
            raise
        finally:
            self.busy = False

    def _spool(self, tid):
        """Steps: the Spool, when no other process has it any more."""
        number = self.machine.number
        ours = [t for m, t in self.server.open if m == number]
        elsewhere = yield ('spool', None, 'open_elsewhere', number, ours)
        if len(ours) + elsewhere > LIMIT['transactions']:
            raise Refused(E_BUSY, 'too many open transactions')
        for _ in range(50):
            spool = yield ('spool', None, 'open', number, tid)
            if spool is not None:
                return spool
            yield ('spool', None, 'want', number, tid)
            yield ('wait', 0.1)
        raise Refused(E_BUSY, 'the transaction is open in another process')

    def _adopt(self, tid, kind, lineage, spool):
        """Steps: the Transaction, with all it already holds.

        A delete begins with nothing: its client cannot be told which names
        are held, and sends them again.
        """
        number = self.machine.number
        prefix = 'seg/%016x/%s/' % (number, tid.hex())
        known = dict((yield self._ask('segments_of', prefix)))
        stored = yield ('list', prefix)
        closed = [segment_number(key) for key in set(stored) | set(known)]
        tx = Transaction(tid, kind, lineage, spool)
        if kind == KIND_WRITE:
            for key in stored:
                if key not in known:
                    yield from self._adopt_segment(tx, key)
        yield ('spool', spool, 'scan', closed, kind == KIND_WRITE)
        return tx

    def _adopt_segment(self, tx, key):
        """Steps: take over a segment, if the log does not drop it now."""
        try:
            segment = yield from segment_load(key)
            lists = yield from segment_lists(segment, WITHDRAWN_LIST)
        except NoObject:
            state = yield from self._current()
            if not (yield from droppable(self.machine.number, state.k,
                                         [key])):
                return
            raise
        yield ('spool', tx.spool, 'keep', segment, lists)
        tx.segments.append(segment)

    def _leave(self):
        """Steps: let go of the transaction; it stays for a later BEGIN."""
        before, self.busy = self.busy, True
        try:
            yield ('spool', self.tx.spool, 'close')
        finally:
            self.busy = before
            self._forget()

    def _forget(self):
        self._unreserve(self.tx.tid)
        self.tx, self.batch, self.batch_bytes = None, [], 0

    def _unreserve(self, tid):
        if self.server.open.get(self._place(tid)) is self:
            del self.server.open[self._place(tid)]

    def _take(self, kind, body):
        """Check a PUT, WITHDRAW or DELETE and put it into the batch."""
        tx = self.tx
        if tx is None:
            raise Refused(E_EXPIRED, 'no transaction is open here')
        if (kind == DELETE) != (tx.kind == KIND_DELETE):
            raise Refused(E_ROLE, 'not in a transaction of this kind')
        if kind == PUT:
            entry = (body[32:33], body[:32], memoryview(body)[33:])
            block_check(entry[0], entry[2])
            self.arrived_bytes += len(entry[2])
            for quota in self.quotas:
                if quota.used + self.arrived_bytes > quota.most:
                    raise quota_refusal(quota, self.arrived_bytes)
        else:
            entry = self._take_names(tx, kind, body)
        self.batch.append(entry)
        self.batch_bytes += len(body)
        self.arrived += 1

    def _take_names(self, tx, kind, body):
        reader = Reader(body)
        count = len(reader.names())
        reader.end()
        if not count:
            raise Refused(E_BAD, 'a list of no names')
        tx.listed += count
        return (DELETED_LIST if kind == DELETE else WITHDRAWN_LIST, ZERO32,
                body[2:])

    def _check_listed(self, tx):
        """Steps: Refused once more names are listed than can be right.

        Without end they would fill the disk.
        """
        if tx.kind == KIND_WRITE:
            puts = tx.spool.rows + len(tx.spool.table) // ROW.size
            if tx.listed > puts + LIMIT['names withdrawn']:
                raise Refused(E_BAD, 'more is withdrawn than was put')
        elif tx.listed > tx.blocks:
            state = yield from self._current()
            tx.blocks = state.blocks
            if tx.listed > tx.blocks:
                raise Refused(E_MISMATCH if state.n == tx.n else E_CONFLICT,
                              'more names to delete than there are blocks')

    def _revive(self, body):
        """Steps: deleted blocks to bring back; ADDED says what is kept."""
        reader = Reader(body)
        names = reader.names()
        reader.end()
        tx = self._own()
        if tx.kind != KIND_DELETE or tx.listed:
            raise Refused(E_ROLE, 'not in a transaction of this kind')
        yield from self._current()
        kept = yield self._ask('kept', names)
        if len(set(names)) < len(names) or not (
                set(names) <= kept.keys() - tx.revived.keys()):
            raise Refused(E_NOBLOCK, 'a block to revive is not kept any '
                          'more, or is named twice')
        tx.revived.update((name, kept[name]) for name in names)
        rows = [ADDED_ROW.pack(name, *kept[name]) for name in names]
        if rows:
            self.batch.append((REVIVED_LIST, ZERO32, b''.join(rows)))
            self.batch_bytes += ADDED_ROW.size * len(rows)
            yield from self.flush()
        yield from many(ADDED, rows)
        yield ('answer', OK, b'')

    @staticmethod
    def _segment_full(spool):
        return (spool.size >= LIMIT['segment']
                or len(spool.table) >= LIMIT['segment entries'] * ROW.size)

    def _segment_close(self, tx):
        """Steps: make the open segment an object, durable on return.

        On an error the file is given up: after a failed fsync nobody knows
        what of it is on the disk, also if the next one succeeds.
        """
        spool = tx.spool
        if not spool.table:
            return
        try:
            path, segment = yield ('spool', spool, 'finish')
            segment.key = segment_key(self.machine.number, tx.tid,
                                      spool.number, segment.table_hash)
            # What may be there already is the same.
            yield ('put', segment.key, path)
            yield ('spool', spool, 'keep', segment)
        except StoreError:
            yield ('spool', spool, 'drop')
            yield from self._leave()
            raise
        tx.segments.append(segment)
        yield ('spool', spool, 'drop')

    def _abort(self, body):
        Reader(body).end()
        tx = self._own()
        self._need(KIND_ROLE[tx.kind])
        self.batch, self.batch_bytes, self.busy = [], 0, True
        try:
            dropped = yield from log_drop(self.machine.number,
                                          [s.key for s in tx.segments])
            for key in dropped:
                yield ('delete', key)
            yield ('spool', tx.spool, 'close', True)
            self._forget()
        finally:
            self.busy = False
        yield ('answer', OK, b'')

    def _own(self):
        if self.tx is None:
            raise Refused(E_EXPIRED, 'no transaction is open here')
        return self.tx

    # Commits.

    def _commit(self, frame, body):
        """Steps: CHECKPOINT, COMMIT or NUKE."""
        if len(body) + U64.size > CEILING['frame']:
            # No client could be told of it, a time before it.
            raise Refused(E_BAD, 'commit object of %d bytes' % len(body))
        commit = commit_decode(body)
        self._check_author(frame, commit)
        yield from self.flush()
        self.busy = True
        try:
            yield from self._decide(frame, commit, body)
        finally:
            self.busy = False

    def _check_author(self, frame, commit):
        """Rule 1: the machine, the role and its signature."""
        if commit.machine != self.machine.number or (
                commit.kind not in COMMIT_KINDS[frame]):
            raise Refused(E_BAD, 'commit of another machine or kind')
        role = KIND_ROLE[commit.kind]
        self._need(role)
        if not verify(self.machine.key(role), commit.signature,
                      commit.signed):
            raise Refused(E_ROLE, 'the commit\'s signature does not verify')

    def _decide(self, frame, commit, body):
        """Steps: rules 2 to 7, again for as long as others are faster."""
        while True:
            state = yield from self._current()
            if commit.n <= state.n:
                when = yield from self._decided(state, commit)
                break
            log_whole(state)
            if commit.n > state.n + 1:
                raise Refused(E_RESYNC, 'commit %d when %d is the last'
                              % (commit.n, state.n))
            if commit.previous != (state.head or self.genesis):
                raise Refused(E_CONFLICT, 'commit %d has another predecessor'
                              % commit.n)
            entry = yield from self._judge(commit, body, state)
            if entry and (yield from log_put(entry)):
                yield from self._current()
                when = entry.time
                break
        yield from self._finish(frame, commit)
        yield ('answer', COMMITTED, U64.pack(commit.n) + commit.hash
               + U64.pack(when))

    def _decided(self, state, commit):
        """Steps: rule 2, receive time if commit n is this very one."""
        found = yield self._ask('at', state.k, 'commit_at', commit.n)
        if found is None:
            log_whole(state)            # nobody can tell
        if not found or found[0] != commit.hash:
            raise Refused(E_CONFLICT, 'commit %d is another' % commit.n)
        return found[2]

    def _judge(self, commit, body, state):
        """Steps: the Entry for a good commit; None if the index moved on."""
        tx = self._transaction_of(commit)
        change = Change(commit, tx.lineage, tx.spool, tx.revived,
                        self.rotten) if tx else Change(commit)
        verdict = yield self._ask('check', state.k, change)
        if verdict is None:
            return None
        # Others may have written since this was measured.
        most = self.machine.quota
        if tx and most is not None and verdict.bytes > max(most, state.bytes):
            raise quota_refusal(Quota('machine', most, state.bytes),
                                verdict.bytes - state.bytes)
        if tx and verdict.bytes > state.bytes:
            yield from self._check_account(tx, verdict.bytes - state.bytes)
        now = yield ('now',)
        if tx and tx.kind == KIND_WRITE and (
                now >= tx.began + LIMIT['seconds in debt']):
            yield from self._check_funds()      # or it might never end
        entry = Entry(self.machine.number, state.k + 1, state.log_hash,
                      max(now, state.time), body)
        entry.blocks, entry.bytes = verdict.blocks, verdict.bytes
        if commit.kind == KIND_ABORT and self.tx and (
                self.tx.tid == commit.tid):
            entry.drops = yield from droppable(
                self.machine.number, state.k,
                [s.key for s in self.tx.segments])
        if tx:
            if not (yield from self._segments_ready(tx, state.k)):
                return None
            entry.segments = [
                (s.key, s.size, s.table_hash, s.count, dead)
                for s, dead in zip(tx.segments, verdict.dead)]
        return entry

    def _check_account(self, tx, more):
        """Steps: Refused if all machines of the account hold too much with
        the `more` bytes of a commit; what it put is among what they hold.
        """
        if tx.kind == KIND_WRITE and not any(
                quota.whose == 'account' for quota in self.quotas):
            return
        for quota in (yield from quotas(self.machine)):
            used = quota.used - (more if tx.kind == KIND_WRITE else 0)
            if quota.whose == 'account' and used + more > quota.most:
                raise quota_refusal(quota._replace(used=used), more)

    def _transaction_of(self, commit):
        """The open transaction a commit is of; None if it needs none."""
        if commit.kind in (KIND_NUKE, KIND_ABORT):
            return None
        tx = self._own()
        if tx.tid != commit.tid or KIND_ROLE[tx.kind] != (
                KIND_ROLE[commit.kind]):
            raise Refused(E_EXPIRED, 'another transaction is open here')
        return tx

    def _segments_ready(self, tx, k):
        """Steps: rules 6 and 7, all its segments durable and none dropped.

        False if the log went on since entry k: then all is judged again.
        """
        number = self.machine.number
        adopted = [s.key for s in tx.segments]
        if len((yield from droppable(number, k, adopted))) < len(adopted):
            if (yield self._ask('state')).k > k:
                return False
            yield from self._leave()
            raise Refused(E_EXPIRED, 'what the transaction held is dropped')
        if tx.spool.table:
            yield from self._segment_close(tx)
        elif adopted:
            # Whoever closed it may have died before the fsync of their
            # directory; putting one again makes all of them durable.
            try:
                data = yield ('get', adopted[-1], 0, None)
            except NoObject:
                if (yield from self._current()).k > k:
                    return False
                raise
            yield ('put', adopted[-1], data)
        return True

    def _finish(self, frame, commit):
        """Steps: the transaction goes on with nothing, or is over."""
        tx = self.tx
        if tx is None or tx.tid != commit.tid or frame == NUKE:
            return
        if frame == CHECKPOINT:
            tx.segments = []
            yield ('spool', tx.spool, 'clear')
            if self.quotas:
                yield from self._measure()
            return
        # Of an abort's own, what its entry drops; never what is committed.
        known = dict((yield self._ask('segments_of', 'seg/%016x/%s/' % (
            self.machine.number, tx.tid.hex()))))
        garbage = [s.key for s in tx.segments if known.get(s.key)]
        yield ('spool', tx.spool, 'close', True)
        self._forget()
        for key in garbage:
            yield ('delete', key)


##############################################################################
# Cleaner
#
# Gives back the space of dead blocks: copies the live ones out of segments
# that are little used, has the log drop these, and deletes them one round
# later.  Merges small segments, too, and drops what dead transactions left.
#
#     round: catch up -> delete what the log dropped before this round
#                     -> drop segments nobody will commit any more
#                     -> for each batch of segments:
#            copy live blocks to segments of an own transaction
#                     -> extract of each source's table, put if absent
#                     -> log entry k+1 (copies, drops), put if absent
#
# Nothing is lost whoever else does what at the same time, or if it ends in
# between: a source stays until the entry that drops it exists, and copies that
# no entry names are dropped like those of any dead transaction.  Whoever loses
# the put looks again at what of the copies is still good.  All are steps.
##############################################################################


class Policy:
    """What is worth cleaning.  Nothing of it matters for safety."""

    def __init__(self):
        self.used = 70              # per cent; segments used less are copied
        self.gain = 4 * KIB         # bytes; less is not worth the writing
        self.merge = 8              # so many small segments become one
        self.batch = 64 * MIB       # copied for one log entry
        self.sources = 256          # segments dropped by one log entry
        self.rate = 0               # bytes copied a second; 0: no limit
        # Seconds since its last segment after which a transaction is dead:
        self.dead = 30 * 86400
        self.overtaken = 7 * 86400  # if another one was committed since
        self.copies = 3600          # of a cleaner; one batch takes minutes
        self.abandon = False        # all that no process here has open
        self.dry = False            # only say what would be done


class Cleaned:
    """What a round did; bytes unless it says otherwise."""

    FIELDS = ('deleted', 'deleted_bytes', 'dropped', 'dropped_bytes',
              'copied', 'copied_bytes', 'orphans', 'orphan_bytes',
              'damaged')

    def __init__(self):
        self.deleted = 0            # objects, that earlier rounds dropped
        self.deleted_bytes = 0
        self.dropped = 0            # segments, to be deleted by the next
        self.dropped_bytes = 0
        self.copied = 0             # blocks
        self.copied_bytes = 0
        self.orphans = 0            # segments not committed, and left alone
        self.orphan_bytes = 0
        self.damaged = 0            # segments that could not be copied


def clean(machine, policy, done):
    """Steps: one round over a machine; adds to `done`, a Cleaned."""
    state = yield from catch_up(machine)
    if state.lost:
        # What looks dropped or dead may be neither.
        raise Damaged('clean', 'machine %016x' % machine, state.lost)
    if state.erased:
        yield from clean_erased(machine, policy, done)
        return
    known = dict((yield ('index', machine, 'segments_of',
                         'seg/%016x/' % machine)))
    orphans = {}                    # tid -> keys
    for key in (yield ('list', 'seg/%016x/' % machine)):
        if key not in known:
            orphans.setdefault(bytes.fromhex(key.split('/')[2]),
                               []).append(key)
        elif known[key]:
            done.deleted += 1
            done.deleted_bytes += (yield ('size', key)) or 0
            if not policy.dry:
                yield ('delete', key)
    for tid, keys in orphans.items():
        yield from clean_orphans(machine, policy, tid, keys, done)
    since = yield from kept_since(machine)
    keeping = yield ('index', machine, 'keeping', since)
    rows = [row for row in (yield ('index', machine, 'segments_live'))
            if row[0] not in keeping]
    for sources in clean_plan(policy, rows):
        if policy.dry:
            clean_dry(rows, dict(sources), done)
        else:
            yield from clean_batch(machine, policy, sources, done)
    if not policy.dry:
        now = yield ('now',)
        yield ('spool', None, 'sweep', machine,
               now + 1 if policy.abandon else now - policy.dead)


def clean_erased(machine, policy, done):
    """Steps: delete all segments and extracts of a machine that was erased.

    What came since from sessions that had not heard of it is dropped first.
    """
    prefix, late = 'seg/%016x/' % machine, {}
    known = yield ('index', machine, 'segments_of', prefix)
    keys = yield ('list', prefix)
    for key in set(keys).difference(key for key, _ in known):
        late.setdefault(key.split('/')[2], []).append(key)
    for _, same in sorted(late.items()):
        if not policy.dry:
            yield from log_drop(machine, sorted(same))
    keys += yield ('list', 'list/%016x/' % machine)
    for key in keys:
        done.deleted += 1
        done.deleted_bytes += (yield ('size', key)) or 0
        if not policy.dry:
            yield ('delete', key)
    if not policy.dry:
        yield ('spool', None, 'sweep', machine, (yield ('now',)) + 1)


def erase(machine, reason):
    """Steps: the log says that all a machine stored is deleted; the State.

    Durable on return.  Nothing of it can be read or stored from then on, and
    clean() gives back the space.  What was said before stays.
    """
    prefix = 'seg/%016x/' % machine
    while True:
        state = yield from catch_up(machine)
        if state.erased:
            return state
        entry = yield from log_next(machine, state)
        entry.erased, entry.blocks, entry.bytes = reason, 0, 0
        known = dict((yield ('index', machine, 'segments_of', prefix)))
        there = yield ('list', prefix)
        entry.drops = sorted({key for key, dropped in known.items()
                              if not dropped} | set(there))
        yield from log_put(entry)


def clean_dry(rows, sources, done):
    """What clean_batch would do, if all is well."""
    for key, size, _, _, live, length in rows:
        if key in sources:
            done.dropped += 1
            done.dropped_bytes += size
            done.copied += live
            done.copied_bytes += length


def kept_since(machine):
    """Steps: what was deleted at this time or later must still be kept.

    The delay is looked up whenever segments are to be dropped; so it holds
    for whoever cleans, though time takes no part in what is correct.
    """
    found = yield from machine_load(machine)
    now = yield ('now',)
    return now + 1 - delete_delay(found.delays if found else [], now)


def clean_orphans(machine, policy, tid, keys, done):
    """Steps: drop the segments of an uncommitted transaction if it is dead.
    """
    dead = yield from transaction_dead(machine, policy, tid, keys)
    dropped = keys if dead and policy.dry else []
    if dead and not policy.dry:
        dropped = yield from log_drop(machine, keys)
    for key in keys:
        size = (yield ('size', key)) or 0
        if key in dropped:
            done.dropped += 1
            done.dropped_bytes += size
        else:
            done.orphans += 1
            done.orphan_bytes += size


def transaction_dead(machine, policy, tid, keys):
    """Steps: True if nobody is likely to commit these segments any more.

    If somebody does, he hears EXPIRED and sends them again.
    """
    spool = yield ('spool', None, 'open', machine, tid)
    if spool is None:
        return False                # in use
    yield ('spool', spool, 'close')
    made = yield ('made', keys[-1])
    age = (yield ('now',)) - (made or 0)
    if tid.startswith(CLEANER):
        return age > policy.copies
    state = yield ('index', machine, 'state')
    return (policy.abandon or age > policy.dead
            or age > policy.overtaken and state.time > (made or 0))


def clean_plan(policy, rows):
    """Batches of segments to clean, of `rows` as segments_live.

    Yields lists of (key, size).  A segment is taken if dropping it frees
    enough of it, or with others of its size class (powers of `merge`).
    """
    poor, classes = [], {}
    for row in rows:
        key, size, count, lists, live, length = row
        kept = length + live * (ENTRY.size + ROW.size)
        if extract_key(key):
            kept += extract_size(count, lists)
        if size - kept >= max(policy.gain, size * (100 - policy.used) / 100):
            poor.append(row)
        elif live and size * policy.merge <= LIMIT['segment']:
            level = 0
            while size < LIMIT['segment'] / policy.merge ** (level + 1):
                level += 1
            classes.setdefault(level, []).append(row)
    for level in sorted(classes):
        same = classes[level]
        poor += same[:len(same) // policy.merge * policy.merge]
    batch, size = [], 0
    for row in poor:
        if batch and (size + row[5] > policy.batch
                      or len(batch) == policy.sources):
            yield batch
            batch, size = [], 0
        batch.append(row[:2])
        size += row[5]
    if batch:
        yield batch


class Copies:
    """The segments a cleaner makes of one batch."""

    def __init__(self, machine, tid, spool):
        self.machine = machine
        self.tid = tid
        self.spool = spool
        self.segments = []

    def add(self, entries):
        """Steps: write `entries` as Spool.append."""
        yield ('spool', self.spool, 'append', entries)
        if (self.spool.size >= LIMIT['segment'] or len(self.spool.table)
                >= LIMIT['segment entries'] * ROW.size):
            yield from self.close_segment()

    def close_segment(self):
        """Steps: make the open segment an object, durable on return."""
        if not self.spool.table:
            return
        path, segment = yield ('spool', self.spool, 'finish')
        segment.key = segment_key(self.machine, self.tid, self.spool.number,
                                  segment.table_hash)
        yield ('put', segment.key, path)
        self.segments.append(segment)
        yield ('spool', self.spool, 'drop')


def clean_batch(machine, policy, sources, done):
    """Steps: copy what is live in segments `sources`, and drop them."""
    tid = CLEANER + (yield ('random', 16 - len(CLEANER)))
    spool = yield ('spool', None, 'open', machine, tid)
    copies, ready = Copies(machine, tid, spool), []
    try:
        for key, size in sources:
            try:
                yield from clean_copy(copies, policy, key, size, done)
            except (NoObject, Damaged) as e:
                # Somebody else may have dropped it; else it stays for those
                # who can still read a part of it.
                if not (yield from clean_gone(machine, key)):
                    done.damaged += 1
                    yield ('log', str(e))
                continue
            ready.append((key, size))
        yield from copies.close_segment()
        yield from clean_commit(copies, ready, done)
    except StoreError:
        yield ('spool', spool, 'close', True)
        raise
    yield ('spool', spool, 'close', True)


def clean_gone(machine, key):
    """Steps: True if the log has dropped segment `key` by now."""
    yield from catch_up(machine)
    return dict((yield ('index', machine, 'segments_of', key))).get(key)


def clean_copy(copies, policy, key, size, done):
    """Steps: copy the live blocks of segment `key`, each compared with its
    SHA-256, and put the extract of its table.
    """
    segment = yield from segment_load(key, size)
    rows = [ROW.unpack_from(segment.table, ROW.size * i) for i in (
        yield ('index', copies.machine, 'survivors', key, segment.table))]
    places = [(key, row[2], row[3], row[1]) for row in rows]
    for _, start, end, members in range_plan(places):
        data = memoryview((yield ('get', key, start, end - start)))
        entries = []
        for name, cls, offset, length, digest in (rows[i] for i in members):
            block = data[offset - start:offset - start + length]
            if sha256(block) != digest:
                raise Damaged('read segment', key, 'block %s is damaged'
                              % name.hex())
            entries.append((cls, name, block))
            done.copied += 1
            done.copied_bytes += length
        yield from copies.add(entries)
        if policy.rate:
            yield ('wait', (end - start) / policy.rate)
    if extract_key(key):
        yield from extract_put(segment)


def segment_extract(segment):
    """Steps: the extract of a segment, encoded; Damaged if a list is."""
    lists = []
    for name, cls, offset, length, digest in ROW.iter_unpack(segment.table):
        if cls not in BLOCK_CLASSES:
            data = yield ('get', segment.key, offset, length)
            if sha256(data) != digest:
                raise Damaged('read segment', segment.key,
                              'a list is damaged')
            lists.append(data)
    return extract_encode(segment.table, lists)


def extract_put(segment):
    """Steps: the extract of a segment is in the store, durably."""
    key, data = extract_key(segment.key), (
        yield from segment_extract(segment))
    if not (yield ('put', key, data)) and (
            yield ('get', key, 0, None)) != data:
        raise Damaged('write extract', key, 'there is another one')


def clean_commit(copies, sources, done):
    """Steps: the log says where the blocks are now, and drops `sources`."""
    machine, sizes = copies.machine, dict(sources)
    keys = [segment.key for segment in copies.segments]
    while True:
        state = yield from catch_up(machine)
        since = yield from kept_since(machine)
        found = yield ('index', machine, 'check_move', state.k, list(sizes),
                       [segment.table for segment in copies.segments], keys,
                       since)
        if found is None:
            continue
        drops, dead = found
        if not drops:               # others did it all
            yield from log_drop(machine, keys)
            return
        entry = yield from log_next(machine, state)
        entry.segments = [(s.key, s.size, s.table_hash, s.count, bits)
                          for s, bits in zip(copies.segments, dead)]
        entry.drops = drops
        if (yield from log_put(entry)):
            break
    done.dropped += len(drops)
    done.dropped_bytes += sum(sizes[key] for key in drops)
    yield from catch_up(machine)


##############################################################################
# Scrub
#
# Re-reads what is stored and holds it against the hashes stored with it.  It
# needs no key and replaces nothing; of each segment found whole it puts the
# extract, so that what the segment held is known even if it is lost.  A round
# goes over every object in an order that lets it stop anywhere and go on
# later: what belongs to no machine, then each machine's log, then its
# segments.  Who calls it keeps `saved()`.
##############################################################################

# key; machine in 16 digits or ''; what is wrong; names of blocks lost, in hex.
Damage = collections.namedtuple('Damage', 'key machine what blocks')


def segment_rows(table):
    """Runs of rows of a table, to be read at once: (from, to, rows).

    A row is (number, name, class, offset, length, SHA-256); `from` is the
    header of the first.
    """
    rows, start = [], len(SEGMENT_MAGIC)
    for number, row in enumerate(ROW.iter_unpack(table)):
        end = row[2] + row[3]
        if rows and end - start > LIMIT['read']:
            last = rows[-1][3] + rows[-1][4]
            yield start, last, rows
            start, rows = last, []
        rows.append((number,) + row)
    if rows:
        yield start, rows[-1][3] + rows[-1][4], rows


def segment_rotten(segment, pace):
    """Steps: {row number: what is wrong with that entry}, -1 for the start.

    `pace` is called as steps with the number of bytes of each read.
    """
    bad = {}
    start = yield ('get', segment.key, 0, len(SEGMENT_MAGIC))
    if start != SEGMENT_MAGIC:
        bad[-1] = 'its first bytes are damaged'
    for start, end, rows in segment_rows(segment.table):
        try:
            data = memoryview((yield ('get', segment.key, start,
                                      end - start)))
        except Damaged:
            bad.update((row[0], 'is cut off') for row in rows)
            continue
        yield from pace(end - start)
        for number, name, cls, offset, length, digest in rows:
            pos = offset - start
            body = data[pos:pos + length]
            if sha256(body) != digest:
                bad[number] = 'is damaged'
            elif data[pos - ENTRY.size:pos] != ENTRY.pack(
                    ENTRY_MAGIC, cls, name, length,
                    entry_crc(cls, name, body)):
                bad[number] = 'has a damaged header'
    return bad


class Scrub:
    """A round, where it stands, and all damage known.

    `saved` is what saved() gave, from JSON; `rate` is in bytes a second at
    most, None for as fast as it goes.  With `read_only` nothing is put.
    """

    def __init__(self, saved=None, rate=None, read_only=False):
        saved = saved or {}
        self.rate = rate
        self.read_only = read_only
        self.place = saved.get('place')     # [machine, key] done last, or
        #                                     None before a round
        self.started = saved.get('started', 0)      # of the round, seconds
        self.finished = saved.get('finished', 0)    # of the last whole round
        self.heads = saved.get('heads', {})     # machine -> [k, hash] of its
        #                                         log when last seen
        self.damage = {key: Damage(key, *rest)
                       for key, *rest in saved.get('damage', [])}
        self.objects = 0            # looked at by this object
        self.segments = 0
        self.bytes = 0
        self.queue = None           # segments of self.machine yet to do
        self.machine = None         # whose log has been read, 16 digits
        self.known = {}             # segment -> (size, table hash, count)
        self.past = {}              # the same of those that are dropped
        self.extracts = set()       # keys of those there are
        self.unreadable = 0         # in a row, for what may be no damage

    def saved(self):
        """What the next Scrub needs to go on, for JSON."""
        return {'place': self.place, 'started': self.started,
                'finished': self.finished, 'heads': self.heads,
                'damage': sorted(self.damage.values())}

    def begin(self):
        """Steps: what every run begins with: all that belongs to no machine,
        and what is known as damaged once more.
        """
        if self.place is None:
            self.started = yield ('now',)
            self.place = ['', '']
        yield from self._small()
        for machine in sorted({x.machine for x in self.damage.values()
                               if x.machine}):
            yield from self._log(machine)
            # A segment is looked at with its extract.
            for key in sorted({'seg/' + x.partition('/')[2]
                               for x in self.damage if x.startswith((
                                   'seg/%s/' % machine,
                                   'list/%s/' % machine))}):
                yield from self._segment(key)

    def step(self):
        """Steps: do the next segment, or log; False at the end of a round."""
        if not self.queue:
            if not (yield from self._next_machine()):
                self.place, self.machine = None, None
                self.finished = yield ('now',)
                return False
            return True
        key = self.queue.popleft()
        yield from self._segment(key)
        self.place = [self.machine, key]
        return True

    def _next_machine(self):
        """Steps: read the log of the machine whose turn it is."""
        machine, last = self.place
        numbers = yield from scrub_machines()
        if self.machine == machine:
            last, numbers = '', [x for x in numbers if x > machine]
        else:
            numbers = [x for x in numbers if x >= machine and x]
        if not numbers:
            return False
        if numbers[0] != machine:
            last = ''
        self.machine = numbers[0]
        yield from self._log(self.machine)
        keys = set((yield ('list', 'seg/%s/' % self.machine)))
        keys.update('seg' + x[len('list'):] for x in self.extracts)
        self.queue = collections.deque(sorted(
            x for x in keys | self.known.keys() | self.past.keys()
            if x > last))
        self.place = [self.machine, last]
        return True

    def _pace(self, size):
        """Steps: not faster than asked."""
        self.bytes += size
        if self.rate:
            yield ('wait', size / self.rate)

    def _say(self, key, machine, what, blocks=()):
        self.damage[key] = Damage(key, machine, what, list(blocks))

    def _get(self, key, machine=''):
        """Steps: a small object whole, or None if that cannot be read."""
        self.damage.pop(key, None)
        self.objects += 1
        try:
            data = yield ('get', key, 0, None)
        except StoreError as e:
            self._failed(key, machine, e)
            return None
        self.unreadable = 0
        yield from self._pace(len(data))
        return data

    def _failed(self, key, machine, error, blocks=()):
        """A read failed: damage, unless all of them do."""
        if not isinstance(error, (NoObject, Damaged)):
            self.unreadable += 1
            if self.unreadable >= 3:
                raise error
        self._say(key, machine, reason_of(error), blocks)

    # What belongs to no machine.

    def _small(self):
        """Steps: accounts, machines, their keys, and the store's own."""
        for key in [x for x in self.damage if not x.startswith('seg/')]:
            if not self.damage[key].machine:
                del self.damage[key]
        owners = {}
        for key in (yield ('list', 'machine/')):
            value = yield from self._versioned(key)
            if value:
                number = key.split('/')[1]
                owners[number] = value['keys']
        for key in (yield ('list', 'account/')):
            yield from self._versioned(key)
        for prefix in ('address/', 'owner/'):
            for key in (yield ('list', prefix)):
                value = yield from self._versioned(key)
                # An account is written before anything names it.
                ident = value and value.get('account')
                if ident and not (yield ('list', account_prefix(ident))):
                    self._say(key, '', 'names account %s, which is missing'
                              % ident)
        for key in (yield ('list', 'site/')):
            yield from self._versioned(key)
        for prefix in ('mail/', 'link/', 'owned/', 'session/', 'ask/',
                       'checkout/'):
            for key in (yield ('list', prefix)):
                yield from self._summed(key)
        yield from self._ledger()
        places = yield ('list', 'keys/')
        for key in places:
            yield from self._keys(key, owners)
        for number, keys in owners.items():
            # It is made before the machine.
            key = 'keys/' + sha256(bytes.fromhex(keys)).hex()
            if key not in places:
                self._say(key, '', 'is missing, of machine %s' % number)
        yield from self._store()

    def _versioned(self, key):
        data = yield from self._get(key)
        if data is None:
            return None
        try:
            versioned_number(key)
            return versioned_decode(key, data)
        except Damaged as e:
            self._say(key, '', reason_of(e))
        return None

    def _summed(self, key):
        """Steps: an object with a sum that may be deleted meanwhile."""
        data = yield from self._get(key)
        try:
            if data is not None:
                versioned_decode(key, data)
            elif (yield ('size', key)) is None:
                del self.damage[key]
        except Damaged as e:
            self._say(key, '', reason_of(e))

    def _ledger(self):
        """Steps: what was used, paid and closed; nothing of it ever goes."""
        for key in (yield ('list', 'standing/')):
            yield from self._versioned(key)
        for prefix, decode in (
                ('pay/', money_decode), ('adjust/', money_decode),
                ('ledger/', lines_decode), ('usage/', lines_decode),
                ('traffic/', lines_decode), ('closed/', lines_decode)):
            for key in (yield ('list', prefix)):
                data = yield from self._get(key)
                try:
                    if data is not None:
                        decode(key, data)
                except Damaged as e:
                    self._say(key, '', reason_of(e))

    def _keys(self, key, owners):
        """Steps: keys/HASH leads to the machine with these keys."""
        data = yield from self._get(key)
        if data is None:
            return
        try:
            number = '%016x' % number_decode(key, data)
        except Damaged as e:
            self._say(key, '', reason_of(e))
            return
        prefix = 'machine/%s/' % number
        if number in owners:
            if key != 'keys/' + sha256(
                    bytes.fromhex(owners[number])).hex():
                self._say(key, '', 'names a machine with other keys')
        elif not any(x.startswith(prefix) for x in self.damage):
            # Registering ends with it: it may be on its way.
            yield ('wait', 1)
            if not (yield ('list', prefix)):
                self._say(key, '', 'names machine %s, which is missing'
                          % number)

    def _store(self):
        """Steps: the id of the store, and what S3 is tried out with."""
        data = yield from self._get('store-id')
        if data is not None:
            try:
                store_id_decode(data)
            except Damaged as e:
                self._say('store-id', '', reason_of(e))
        if (yield ('size', 'probe')) is not None:
            data = yield from self._get('probe')
            if data not in (None, PROBE):
                self._say('probe', '', 'is damaged')

    # A machine.

    def _log(self, machine):
        """Steps: every log entry, and the chain they make."""
        self.known, self.past = {}, {}
        self.extracts = set((yield ('list', 'list/%s/' % machine)))
        number = int(machine, 16)
        for key in [x for x in self.damage
                    if x.startswith('log/%s/' % machine)]:
            del self.damage[key]
        keys = yield ('list', 'log/%s/' % machine)
        last = log_last(number, keys)
        before, head = yield from self._log_head(number)
        for k in range(1, last + 1):
            key = log_key(number, k)
            data = yield from self._get(key, machine)
            entry = None
            if data is not None:
                try:
                    entry = log_decode(number, k, data)
                    head = self._entry(key, machine, entry, before, head)
                except (Damaged, Refused) as e:
                    self._say(key, machine, reason_of(e))
            before = entry.hash if entry else None
        seen, digest = self.heads.get(machine, [0, ''])
        if last < seen:
            self._say(log_key(number, seen), machine, 'is missing: the log '
                      'ends at entry %d, it had %d' % (last, seen))
        elif before and digest and last == seen and before.hex() != digest:
            self._say(log_key(number, seen), machine, 'is another one than '
                      'it was')
        elif before:
            self.heads[machine] = [last, before.hex()]

    def _log_head(self, number):
        """Steps: what comes before entry 1: (its hash, H_0 or None)."""
        try:
            machine = yield from machine_load(number)
            store = store_id_decode((yield ('get', 'store-id', 0, None)))
        except StoreError:
            machine = None
        return ZERO32, machine and genesis(number, store, machine.keys)

    def _entry(self, key, machine, entry, before, head):
        """Note an entry's segments; H_n after it, None if that is unknown.

        `before` and `head` are the hashes it must follow, if they are known.
        """
        if before not in (None, entry.previous):
            self._say(key, machine, 'does not follow the one before')
        for name, size, digest, count, _ in entry.segments:
            self.known[name] = (size, digest, count)
        for name in entry.drops:
            if name in self.known and extract_key(name):
                self.past[name] = self.known[name]
            self.known.pop(name, None)
        if entry.erased is not None:
            self.known, self.past = {}, {}      # extracts go as well
        if not entry.commit:
            return head
        commit = commit_decode(entry.commit)
        if head not in (None, commit.previous):
            if commit.n > 1:
                self._say(key, machine,
                          'its commit does not follow the one before')
            elif 'store-id' not in self.damage:
                self._say('store-id', '', 'not the one that machine %s was '
                          'registered with' % machine)
        return commit.hash

    def _segment(self, key):
        """Steps: one segment, against the log or else against itself, and
        its extract.
        """
        machine = key.split('/')[1]
        before = self.damage.pop(key, None)
        self.damage.pop(extract_key(key), None)
        self.segments += 1
        segment = None
        try:
            segment = yield from self._segment_check(key, machine)
            self.unreadable = 0
        except NoObject as e:
            # Dropped meanwhile, or never committed, it is nothing to lack.
            if key in self.known:
                yield from self._log(machine)
            if key in self.known:
                self._failed(key, machine, e)
        except (StoreError, Refused) as e:
            self._failed(key, machine, e)
        if before and key in self.damage and not self.damage[key].blocks:
            self.damage[key] = self.damage[key]._replace(
                blocks=before.blocks)
        if extract_key(key):
            yield from self._extract(key, machine, segment)

    def _extract(self, key, machine, segment):
        """Steps: a segment's extract; `segment` is None if that is gone."""
        extract = extract_key(key)
        if extract not in self.extracts:
            if segment and not self.read_only and (
                    key in self.known or key in self.past):
                yield from extract_put(segment)
                self.extracts.add(extract)
            elif key in self.past and segment is None and (
                    yield ('size', key)) is None:
                self._say(extract, machine, 'is missing')
            return
        data = yield from self._get(extract, machine)
        if data is None:
            if (yield ('size', extract)) is None:
                yield from self._log(machine)
                if key not in self.known and key not in self.past:
                    del self.damage[extract]    # erased meanwhile
            return
        try:
            extract_decode(extract, data)
            if segment:
                yield from extract_put(segment)
        except (Damaged, struct.error) as e:
            self._say(extract, machine, reason_of(e))

    def _segment_check(self, key, machine):
        """Steps: the Segment, None if it is damaged."""
        known, wrong = self.known.get(key) or self.past.get(key), []
        size = yield ('size', key)
        if size is None:
            raise NoObject('read', key)
        self.objects += 1
        if known and size != known[0]:
            wrong.append('%d bytes long, not %d' % (size, known[0]))
        try:
            segment = yield from segment_load(key, size)
        except Damaged as e:
            self._say(key, machine, '; '.join(wrong + [reason_of(e)])
                      + (', of %d entries' % known[2] if known else
                         ', not committed'))
            return None
        yield from self._pace(len(segment.table))
        if known and segment.table_hash != known[1]:
            wrong.append('it is another segment')
        bad = yield from segment_rotten(segment, self._pace)
        wrong += ['entry %d %s' % (i, bad[i]) if i >= 0 else bad[i]
                  for i in sorted(bad)[:3]]
        if len(bad) > 3:
            wrong.append('%d entries in all' % len(bad))
        if wrong:
            rows = list(ROW.iter_unpack(segment.table))
            self._say(key, machine, '; '.join(wrong), [
                rows[i][0].hex() for i in sorted(bad)
                if i >= 0 and 'header' not in bad[i]
                and rows[i][1] in BLOCK_CLASSES])
        return None if wrong else segment


def reason_of(error):
    """What a StoreError or Refused says after its object."""
    return getattr(error, 'reason', str(error))


def scrub_machines():
    """Steps: all machines there are traces of, in 16 digits, sorted."""
    found = set()
    for prefix in ('machine/', 'log/', 'seg/'):
        found.update(x.split('/')[1] for x in (yield ('list', prefix)))
    return sorted(x for x in found
                  if len(x) == 16 and not set(x) - set('0123456789abcdef'))


##############################################################################
# Repair
#
# Puts back what can be known again to the byte, and proves it by the hash that
# was stored elsewhere: a log entry from the index, which keeps what it has
# seen; the magic, headers, table and footer of a segment from its entries and
# the log; an extract from its segment.  Nothing is made up, and what is whole
# is not touched.  All are steps.
##############################################################################


def mend(key, data, dry):
    """Steps: object `key` is `data` again; whether it was not."""
    try:
        if (yield ('get', key, 0, None)) == data:
            return False
        verb = 'mend'
    except NoObject:
        verb = 'put'
    except LOST:
        verb = 'mend'
    if not dry:
        yield (verb, key, data)
    return True


def repair_log(machine, dry):
    """Steps: keys of log entries that were put back from the index.

    Only from one that lacks nothing, and as far as each entry is what the one
    after it says.  One of another history stays; and in a store that was put
    back from an older copy, where segments lack as well, no entry is added.
    """
    state, todo, older = (yield ('index', machine, 'state')), [], False
    erased = state.erased is not None
    if (yield ('index', machine, 'lost')):
        return []
    digest = state.log_hash
    for k in range(state.k, 0, -1):
        data = yield ('index', machine, 'log_entry', k)
        if data is None or sha256(data) != digest:
            break
        key, entry = log_key(machine, k), log_decode(machine, k, data)
        digest = entry.previous
        try:
            log_decode(machine, k, (yield ('get', key, 0, None)))
        except NoObject:
            todo.append((key, data, True))
            for segment in entry.segments:
                if not erased and not (
                        yield from segment_known(machine, segment[0])):
                    older = True
        except LOST:
            todo.append((key, data, False))
    mended = []
    for key, data, missing in todo:
        if not (missing and older):
            yield from mend(key, data, dry)
            mended.append(key)
    return mended


def segment_known(machine, key):
    """Steps: True if there is the segment or its extract, or it is one of the
    cleaner's that the log has dropped.
    """
    extract = extract_key(key)
    if (yield ('size', key)) is not None:
        return True
    if extract:
        return (yield ('size', extract)) is not None
    return bool(dict((yield ('index', machine, 'segments_of', key))).get(key))


def repair_segment(key, size, digest, dry):
    """Steps: True if a segment of the log was put together again.

    It needs the data of all entries, and the table or all headers.
    """
    try:
        table = (yield from segment_load(key, size)).table
    except Damaged:
        table = b''
    if sha256(table) != digest:
        table = yield from segment_scan(key)
    if sha256(table) != digest:
        return False
    out = [SEGMENT_MAGIC]
    for name, cls, offset, length, wanted in ROW.iter_unpack(table):
        try:
            data = yield ('get', key, offset, length)
        except LOST:
            return False
        if sha256(data) != wanted:
            return False
        out += (ENTRY.pack(ENTRY_MAGIC, cls, name, length,
                           entry_crc(cls, name, data)), data)
    start = sum(map(len, out))
    out += (table, FOOTER.pack(start, len(table) // ROW.size, digest,
                               FOOTER_MAGIC))
    return (yield from mend(key, b''.join(out), dry))


def repair(machine, keys, dry):
    """Steps: keys of what was put back of a machine's log, and of `keys`,
    its segments and extracts that scrub found damaged.
    """
    mended = yield from repair_log(machine, dry)
    state = yield from catch_up(machine)
    known = {}
    for k in range(1, state.k + 1):
        data = yield ('index', machine, 'log_entry', k)
        if data:
            for segment in log_decode(machine, k, data).segments:
                known[segment[0]] = segment[1:3]
    for key in keys:
        if key in known and (
                yield from repair_segment(key, *known[key], dry)):
            mended.append(key)
    for key in keys:
        source = 'seg' + key[len('list'):]
        if key.startswith('list/') and source in known:
            data = yield from extract_made(source, *known[source])
            if data and (yield from mend(key, data, dry)):
                mended.append(key)
    return mended


def extract_made(key, size, digest):
    """Steps: the extract of a segment of the log, or None if that is not
    whole.
    """
    try:
        segment = yield from segment_load(key, size)
        if segment.table_hash != digest:
            return None
        return (yield from segment_extract(segment))
    except LOST:
        return None


##############################################################################
# Payments: requests
#
# The keys of payment providers, and their APIs over HTTPS.  Knows status
# codes, and what may be sent again; not what payments are.
##############################################################################

PAY_LIMIT = {
    'attempts': 3,              # as Stripe's own clients do
    'silence': 10,              # seconds, of a connection
    'in all': 25,               # seconds; no new attempt after
    'first delay': 0.5,         # seconds; doubled by each attempt
    'longest delay': 5,
    'answer': 8 * MIB,
    'certificates': 8,          # number, that are kept
}
# The version whose fields we read; without it Stripe takes the one that the
# account began with.
STRIPE_VERSION = '2026-06-24.dahlia'
PROVIDER_HOSTS = {
    'stripe': ('https://api.stripe.com', 'https://checkout.stripe.com'),
    'paypal': ('https://api-m.paypal.com', 'https://www.paypal.com')}
PAYPAL_SANDBOX = 'https://api-m.sandbox.paypal.com'
PROVIDER_OPTIONS = {
    'stripe': {'secret-key', 'webhook-secret', 'price', 'api', 'page'},
    'paypal': {'client-id', 'client-secret', 'webhook-id', 'api', 'page'}}


def loopback(url):
    """True if a URL is of a server on this host, such as a test's."""
    import urllib.parse
    return urllib.parse.urlsplit(url).hostname in ('localhost', '127.0.0.1',
                                                   '::1')


def form_flat(value, name=''):
    """A dict as pairs for a form: {'a': {'b': [1]}} is a[b][0]=1."""
    if not isinstance(value, (dict, list)):
        return [(name, str(value))]
    pairs = []
    for key, one in (value.items() if isinstance(value, dict)
                     else enumerate(value)):
        pairs += form_flat(one, '%s[%s]' % (name, key) if name else key)
    return pairs


def provider_reason(status, body):
    """What an API says is wrong, in a line."""
    text = ''
    try:
        error = json.loads(body)
        error = error.get('error', error)
        if isinstance(error, dict):
            details = error.get('details') or [{}]
            text = ' '.join(str(x) for x in (
                error.get('code') or error.get('name') or '',
                details[0].get('issue', ''), error.get('message', '')) if x)
    except (ValueError, AttributeError, TypeError, LookupError,
            RecursionError):
        pass                            # it says something else
    return printable('%d %s' % (status, text))[:300].strip()


class Provider:
    """Requests to one API; any thread."""

    def __init__(self, name, api):
        self.name = name
        self.api = api
        self.opener = None              # of urllib, made when first needed

    def _open(self, request):
        """Its response.  A redirect is not followed: keys go with it."""
        import urllib.request
        if self.opener is None:
            opener = urllib.request.OpenerDirector()
            for handler in ('ProxyHandler', 'HTTPHandler', 'HTTPSHandler',
                            'HTTPDefaultErrorHandler', 'HTTPErrorProcessor',
                            'UnknownHandler'):
                opener.add_handler(getattr(urllib.request, handler)())
            self.opener = opener
        return self.opener.open(request, timeout=PAY_LIMIT['silence'])

    def send(self, method, path, data, headers):
        """The answer, bytes; ProviderError.

        Every request can be made again: what changes something has a key
        that makes it happen once.
        """
        begin, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                return self._once(method, path, data, headers)
            except ProviderError as e:
                wait = self._wait(attempt)
                if not e.again or attempt == PAY_LIMIT['attempts'] or (
                        time.monotonic() - begin + wait
                        > PAY_LIMIT['in all']):
                    raise
            time.sleep(wait)

    @staticmethod
    def _wait(attempt):
        """Seconds before the next attempt; not all clients at once."""
        first = PAY_LIMIT['first delay']
        wait = min(PAY_LIMIT['longest delay'], first * 2 ** (attempt - 1))
        return max(first, wait * (0.5 + os.urandom(1)[0] / 510))

    def _once(self, method, path, data, headers):
        import http.client
        import urllib.error
        import urllib.parse
        import urllib.request
        url = self.api + urllib.parse.quote(path, '/?&=:')
        request = urllib.request.Request(
            url, data, dict(headers, **{'User-Agent': 'tarsnapd/' + VERSION}),
            method=method)
        try:
            with self._open(request) as response:
                body = response.read(PAY_LIMIT['answer'])
                if response.read(1):
                    raise ProviderError('%s: an answer without end'
                                        % self.name)
                if response.length:     # read() says nothing of that
                    raise ProviderError('%s: half an answer' % self.name, 0,
                                        True)
                return body
        except urllib.error.HTTPError as e:
            raise self._error(e) from None
        except http.client.HTTPException as e:
            raise ProviderError('%s: %s' % (self.name, type(e).__name__), 0,
                                True) from None
        except OSError as e:
            reason = getattr(e, 'reason', None) or e.strerror or e
            raise ProviderError('%s: %s' % (self.name, printable(
                str(reason))), 0, True) from None

    def _error(self, e):
        """The ProviderError of a status that is none of success."""
        import http.client
        try:
            with e:
                body = e.read(65536)
        except (OSError, http.client.HTTPException):
            body = b''
        again = e.headers.get('Stripe-Should-Retry')
        return ProviderError(
            '%s: %s' % (self.name, provider_reason(e.code, body)), e.code,
            again == 'true' if again in ('true', 'false')
            else e.code == 409 or e.code >= 500)

    def json(self, method, path, data, headers):
        """The answer, a dict."""
        try:
            answer = json.loads(self.send(method, path, data, headers))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ProviderError('%s: an answer that is not JSON' % self.name)
        return answer


def basic(user, password):
    """The value of an Authorization header."""
    return 'Basic ' + base64.b64encode(
        ('%s:%s' % (user, password)).encode()).decode()


class Stripe(Provider):
    """Stripe's API, v1."""

    def __init__(self, section, api):
        super().__init__('stripe', api)
        self.authorization = basic(section['secret-key'], '')

    def ask(self, method, path, body, key):
        """The answer, a dict; `body` goes as a form."""
        import urllib.parse
        headers = {'Authorization': self.authorization,
                   'Stripe-Version': STRIPE_VERSION}
        data = None
        if method == 'POST':
            headers['Idempotency-Key'] = key
            data = urllib.parse.urlencode(form_flat(body)).encode()
        return self.json(method, path, data, headers)


class PayPal(Provider):
    """PayPal's REST API.  `cache` is a file, disposable, that keeps what many
    processes would ask for: a token, and certificates.
    """

    def __init__(self, section, api, cache):
        super().__init__('paypal', api)
        self.authorization = basic(section['client-id'],
                                   section['client-secret'])
        # Of these keys at this API.
        self.tag = sha256((api + self.authorization).encode()).hex()[:16]
        self.cache = cache

    def ask(self, method, path, body, key):
        """The answer, a dict; `body` goes as JSON.  For method CERT `path`
        is a URL, and what comes back is the public key in what is there.
        """
        if method == 'CERT':
            return self._key(path)
        data = None if body is None else json.dumps(body).encode()
        headers = {'Content-Type': 'application/json',
                   'Prefer': 'return=representation'}
        if key:
            headers['PayPal-Request-Id'] = key
        for fresh in (False, True):
            headers['Authorization'] = 'Bearer ' + self._token(fresh)
            try:
                return self.json(method, path, data, headers)
            except ProviderError as e:
                if e.status != 401 or fresh:
                    raise
        raise AssertionError('no answer and no error')

    def _token(self, fresh):
        kept = self._recall().get('token', {})
        if not fresh and kept.get('until', 0) > time.time() + 60:
            return kept['text']
        answer = self.json('POST', '/v1/oauth2/token',
                           b'grant_type=client_credentials',
                           {'Authorization': self.authorization})
        token = pick(answer, 'access_token')
        self._keep(token={'text': token, 'until': time.time() + pick(
            answer, 'expires_in', int)})
        return token

    def _key(self, url):
        """The key in the certificate at a URL of PayPal; None if there is
        none that is PayPal's and good today.
        """
        import urllib.parse
        kept = self._recall().get('certificates', {})
        if url in kept:
            return certificate_key(kept[url].encode('latin-1'))
        there = urllib.parse.urlsplit(url)
        place = '%s://%s' % (there.scheme, there.netloc)
        if not (there.path.startswith('/v1/notifications/certs/')
                and (place == self.api if loopback(self.api)
                     else place in (self.api,
                                    self.api.replace('//api-m.', '//api.')))):
            return None
        pem = Provider('paypal', place).send('GET', there.path, None, {})
        key = certificate_key(pem)
        if key is not None:
            kept = dict(list(kept.items())[1 - PAY_LIMIT['certificates']:])
            self._keep(certificates=dict(kept, **{
                url: pem.decode('latin-1')}))
        return key

    def _recall(self):
        """What the cache has for these keys, a dict."""
        try:
            found = json.loads(read_file(self.cache))
            return found if found.get('tag') == self.tag else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _keep(self, **values):
        """Keep what may as well be asked for again."""
        try:
            write_file(self.cache, json.dumps(dict(
                self._recall(), tag=self.tag, **values)).encode())
        except OSError:
            pass


def certificate_key(pem):
    """The public key in a PEM certificate of PayPal; None if it is none, or
    not good today.
    """
    import datetime
    from cryptography import x509
    try:
        cert = x509.load_pem_x509_certificate(pem)
    except ValueError:
        return None
    names = [x.value for x in cert.subject.get_attributes_for_oid(
        x509.oid.NameOID.COMMON_NAME)]
    # Newer versions of the package warn of the names without _utc.
    start, end = (getattr(cert, name + '_utc', None) or getattr(
        cert, name).replace(tzinfo=datetime.timezone.utc)
        for name in ('not_valid_before', 'not_valid_after'))
    now = datetime.datetime.now(datetime.timezone.utc)
    if not start <= now <= end or not any(
            x.endswith('.paypal.com') for x in names):
        return None
    return cert.public_key()


def keys_read(file):
    """The sections of a file of providers' keys, {name: dict}.

    ServerError if somebody else can read it, or it is no such file.
    """
    import configparser
    parser = configparser.ConfigParser(interpolation=None)
    try:
        found = os.stat(file)
        if found.st_mode & 0o077:
            raise ServerError('%s: others can read it' % file)
        if os.geteuid() not in (0, found.st_uid):
            raise ServerError('%s: it is somebody else\'s' % file)
        parser.read_string(read_file(file).decode('utf-8'), file)
        sections = {name: dict(parser[name]) for name in parser.sections()}
    except (configparser.Error, UnicodeDecodeError) as e:
        # What is wrong there may be a key: it is not said.
        raise ServerError('%s: %s' % (file, type(e).__name__)) from None
    except OSError as e:
        raise ServerError('%s: %s' % (file, e.strerror)) from None
    for name, section in sections.items():
        strange = set(section) - PROVIDER_OPTIONS.get(name, set())
        if name not in PROVIDER_OPTIONS or strange:
            raise ServerError('%s: unknown %s' % (
                file, min(strange) if name in PROVIDER_OPTIONS else name))
        needed = {'stripe': ('secret-key',),
                  'paypal': ('client-id', 'client-secret')}[name]
        if not all(section.get(x) for x in needed):
            raise ServerError('%s: [%s] needs %s' % (
                file, name, ' and '.join(needed)))
    return sections


class Shop:
    """What can be paid, how, and where to.

    `conf` has pay-keys, a file in directory `path` or elsewhere, and may have
    pay-first, pay-least and pay-most; `base` is the URL of our pages' place.
    Of `server`, also one that is nothing but pages, we need how accounts are
    charged and whether mail goes out.
    """

    def __init__(self, conf, path, base, server):
        self.post = server.post
        self.prices = server.prices
        self.amnesty = server.amnesty
        self.base = base
        # What can be paid at once, in dollars.
        self.first, self.least, self.most = (
            self._dollars(conf, 'pay-' + name, default) for name, default in (
                ('first', '5'), ('least', '5'), ('most', '500')))
        if not max(self.first, self.least) <= self.most:
            raise ServerError('pay-most is less than pay-first or pay-least')
        keys = keys_read(os.path.join(path, conf['pay-keys']))
        self.providers = {}             # name -> Provider
        self.hosts = {}                 # name -> where its pages are
        self.trials = []                # names of those where no money is
        for name, section in keys.items():
            self._add(name, section, path)
        stripe = keys.get('stripe', {})
        self.price = stripe.get('price')
        self.secrets = stripe.get('webhook-secret', '').split()
        self.webhook = keys.get('paypal', {}).get('webhook-id', '')

    @staticmethod
    def _dollars(conf, name, default):
        text = conf.get(name, default)
        if not text.isdecimal() or not 0 < int(text) < 10 ** 6:
            raise ServerError('%s is a number of dollars, not %s'
                              % (name, printable(text)))
        return int(text)

    def _add(self, name, section, path):
        api, page = PROVIDER_HOSTS[name]
        api = section.get('api', api).rstrip('/')
        if api == PAYPAL_SANDBOX:
            page = 'https://www.sandbox.paypal.com'
        page = section.get('page', page).rstrip('/')
        for url in (api, page):
            if not url.startswith('https://') and not loopback(url):
                raise ServerError('%s is not https' % printable(url))
        self.hosts[name] = page
        if api == PAYPAL_SANDBOX or '_test_' in section.get('secret-key', ''):
            self.trials.append(name)
        self.providers[name] = (
            Stripe(section, api) if name == 'stripe'
            else PayPal(section, api, os.path.join(path, 'paypal.cache')))

    def offered(self):
        """Names of the providers that can be paid through."""
        return [name for name in ('stripe', 'paypal')
                if name in self.providers and (name != 'stripe'
                                               or self.price)]

    def ask(self, name, *request):
        """Carry out the wish ('provider', name, ...)."""
        return self.providers[name].ask(*request)

    def lax(self, name):
        """True of a test double, which leaves out what Stripe says."""
        return loopback(self.providers[name].api)

    def pages(self, name):
        """Where a provider's pages are: scheme and host."""
        return self.hosts[name]

    def page(self, checkout):
        """The URL where a payer comes back to, paid or not."""
        return '%spaid.cgi?checkout=%s' % (self.base, checkout.name)


##############################################################################
# Server directory
#
# tarsnapd.conf, the keys, store/, spool/, index/, tmp/; and perform(), which
# carries out the wishes of steps.  Any thread may call perform(); the table of
# open transactions belongs to the thread that runs the sessions.
##############################################################################

# Control characters: no name ends a line of a log, nor drives a terminal.
ONE_LINE = {code: '\\%03o' % code for code in (*range(32), 127)}


def say(line):
    """One line on stderr, in the program's name; never fails: a server serves
    on when the disk of its log is full.
    """
    try:
        print('tarsnapd: %s' % line.translate(ONE_LINE), file=sys.stderr,
              flush=True)
    except (OSError, ValueError):
        pass


def moment(seconds):
    """A time as UTC, to the second."""
    return time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime(seconds))


CONF_OPTIONS = {'listen', 'store', 'accounts', 'workers', 'front-certificate',
                'delete-delay',
                's3-endpoint', 's3-region', 's3-addressing', 's3-profile',
                's3-access-key', 's3-secret-key', 's3-session-token',
                's3-checksum', 's3-ca-bundle', 'scrub-rate',
                'scrub-days', 'read-only',
                'clean-hours', 'clean-rate', 'journal', 'journal-level',
                'storage-price', 'upload-price', 'download-price', 'amnesty',
                'mail-from', 'mail-bounces', 'mail-smtp', 'mail-tls',
                'mail-ca-bundle', 'mail-user', 'mail-password-file',
                'mail-sendmail', 'web-url',
                'pay-keys'}
# Those that init may write.  A secret is no word for a command line.
INIT_OPTIONS = ('listen', 'store', 'accounts', 's3-endpoint', 's3-region',
                's3-addressing', 's3-profile')
OWN_FILES = {'tarsnapd.conf', 'identity.key', 'secret', 'tls.key', 'tls.crt',
             'store', 'accounts', 'spool', 'index', 'tmp', 'scrub',
             'scrub.lock', 'clean.lock', 'canary.key', 'address', 'journal',
             'guesses', 'guesses-journal', 'mail', 'mail.lock', 'ledger.db',
             'ledger.db-wal', 'ledger.db-shm', 'pay.keys', 'paypal.cache'}
STORE_VERBS = ('get', 'put', 'list', 'size', 'made', 'delete', 'mend')
# What is in the store of accounts, where that is not the store of blocks.
ACCOUNT_PLACES = {'account', 'address', 'owner', 'mail', 'link', 'ledger',
                  'usage', 'traffic', 'pay', 'adjust', 'closed',
                  'standing', 'owned', 'site', 'session', 'ask',
                  'checkout'}

CONF = '''\
# tarsnapd.conf(5)
[server]
%s
#store = store
#accounts =
#workers = 1
#front-certificate =
#scrub-rate = 1M
#scrub-days = 1
#read-only = no
#delete-delay = 0
#clean-hours = 24
#clean-rate = 20M
#journal = stderr
#journal-level = sessions
#mail-from =
#mail-smtp =
'''


def is_server(path):
    """True if `path` is a server directory; ServerError if this user may not
    look into it.
    """
    import stat
    try:
        return all(stat.S_ISREG(os.stat(os.path.join(path, name)).st_mode)
                   for name in ('tarsnapd.conf', 'identity.key'))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as e:
        raise ServerError('%s: %s' % (path, e.strerror)) from None


def size_parse(text):
    """A number of bytes with or without k, M or G (1000s); ServerError."""
    units = {'k': 10 ** 3, 'M': 10 ** 6, 'G': 10 ** 9}
    unit = units.get(text[-1:], 1)
    digits = text if unit == 1 else text[:-1]
    if not (digits.isascii() and digits.isdigit()) or not int(digits):
        raise ServerError('%s is not a number of bytes' % text)
    return int(digits) * unit


def conf_read(path, name='tarsnapd.conf', section='server',
              options=CONF_OPTIONS):
    """The [server] section of a server directory's configuration, a dict; or
    a section, which may have these `options`, of another file.
    """
    import configparser
    parser = configparser.ConfigParser(interpolation=None)
    name = os.path.join(path, name)
    try:
        parser.read_string(read_file(name).decode('utf-8'), name)
        section = dict(parser[section])
    except (configparser.Error, KeyError, UnicodeDecodeError) as e:
        raise ServerError('%s: %s' % (name, ' '.join(str(e).split()))) from e
    except OSError as e:
        raise ServerError('%s: %s' % (name, e.strerror)) from None
    unknown = set(section) - options
    if unknown:
        raise ServerError('%s: unknown option %s' % (name, min(unknown)))
    if section.get('s3-secret-key') and os.stat(name).st_mode & 0o077:
        raise ServerError('%s: it holds a secret key, and others can read it'
                          % name)
    return section


# By the way mail goes out: what is spoken there, and the port for it.
MAIL_PORTS = {'starttls': 587, 'tls': 465, 'no': 25}


class Post:
    """Whom mail is from and how it goes out, by tarsnapd.conf(5)."""

    def __init__(self, conf, path):
        import email.utils
        import shlex
        name, self.sender = email.utils.parseaddr(conf['mail-from'])
        self.bounces = conf.get('mail-bounces', self.sender)
        for option in (self.sender, self.bounces):
            if not mail_address(option):
                raise ServerError('mail-from and mail-bounces: "%s" is not a '
                                  'mail address' % printable(option))
        self.service = printable(name) or self.sender.split('@')[1]
        self.url = conf.get('web-url')
        self.tls = conf.get('mail-tls', 'starttls')
        if self.tls not in MAIL_PORTS:
            raise ServerError('mail-tls is starttls, tls or no, not %s'
                              % self.tls)
        self.smtp = self._smtp(conf)        # (host, port), or None
        self.program = shlex.split(conf.get('mail-sendmail',
                                            '/usr/sbin/sendmail'))
        self.ca_bundle = conf.get('mail-ca-bundle')
        self.user = conf.get('mail-user')
        self.file = os.path.join(path, conf.get('mail-password-file', ''))
        if self.user and self.tls == 'no':
            raise ServerError('mail-user needs mail-tls: a password is not '
                              'sent in the clear')

    def _smtp(self, conf):
        text = conf.get('mail-smtp')
        if not text:
            return None
        host, _, port = text.rpartition(':')
        if text.endswith(']') or not host:
            host, port = text, '%d' % MAIL_PORTS[self.tls]
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ServerError('mail-smtp is HOST or HOST:PORT, not %s' % text)
        return host.strip('[]'), int(port)

    def page(self, name):
        """The address of one of the account pages."""
        return self.url.rpartition('/')[0] + '/' + name

    def password(self):
        """The first line of its file; ServerError if others can read it."""
        try:
            if os.stat(self.file).st_mode & 0o077:
                raise ServerError('%s: others can read it' % self.file)
            return read_file(self.file).decode('utf-8').split('\n')[0]
        except UnicodeDecodeError:
            raise ServerError('%s: not UTF-8' % self.file) from None
        except OSError as e:
            raise ServerError('%s: %s' % (self.file, e.strerror)) from None


def days_parse(text):
    """A delete delay in days; ServerError if it is none."""
    if not text.isdecimal() or int(text) > MOST_DAYS:
        raise ServerError('%s is not a number of days from 0 to %d'
                          % (printable(text), MOST_DAYS))
    return int(text)


def printable(text):
    return ''.join(c if c.isprintable() else '?' for c in text)


def server_create(path, options=()):
    """Make the directory `path`, missing or empty, a server directory.

    `options` are for a new tarsnapd.conf, {name: value}.  Complete and
    durable on return; what a crash leaves is completed by the next call.
    ServerError if there are other files in it.
    """
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        strange = set(os.listdir(path)) - OWN_FILES
        if strange and not is_server(path):
            raise ServerError('%s: not empty, and not a server directory: %s'
                              % (path, min(strange)))
        for name in ('tmp', 'store', 'spool', 'index'):
            os.makedirs(os.path.join(path, name), 0o700, exist_ok=True)
        os.chmod(path, 0o700)
        files = FileStore(path, os.path.join(path, 'tmp'))
        files.put('secret', os.urandom(32))
        files.put('identity.key', identity_make())
        options = dict({'listen': '[::]:%d' % PORT}, **dict(options))
        store = store_open(
            path, conf_read(path) if is_server(path) else options, True)
        store.prepare()
        store_id_missing(store)
        store.put('store-id', os.urandom(16).hex().encode() + b'\n')
        store.close()
        if options.get('accounts'):
            store = store_open(path, options, True, 'accounts')
            store.prepare()
            store.close()
        # Last of what makes it a server directory: an init that failed on
        # its options can be repeated with others.
        files.put('tarsnapd.conf', (CONF % '\n'.join(
            '%s = %s' % option for option in options.items())).encode())
    except OSError as e:
        raise ServerError('%s: %s' % (path, e.strerror)) from None
    except (StoreError, ValueError) as e:
        raise ServerError('%s: %s' % (ascii(path)[1:-1], e)) from None


def store_open(path, conf, create=False, name='store'):
    """The store of a server directory with configuration `conf`, or the one
    that option `name` says.

    A configured directory that is not there is not made in passing: it may be
    a disk that is not mounted, and a new store is another store.
    """
    if '://' in conf.get(name, ''):
        return S3Store(conf[name], conf, os.path.join(
            path, 'tmp', name + '.turn'))
    store = os.path.join(path, conf.get(name, 'store'))
    temporary = os.path.join(path, 'tmp')
    if store != os.path.join(path, 'store'):
        temporary = os.path.join(store, '.tmp')
    if create:
        os.makedirs(temporary, 0o700, exist_ok=True)
        os.makedirs(store, 0o700, exist_ok=True)
        if os.stat(store).st_mode & 0o020:
            # Its group writes there, too, and gets what is written.
            os.chmod(temporary, 0o2770)
    return FileStore(store, temporary)


def store_id_missing(store):
    """ServerError if a store in use has lost its id: with another one it
    would be another store to every key.
    """
    if store.size('store-id') is None and store.list('machine/'):
        raise ServerError('%s: store-id is missing' % store.name)


def identity_make():
    """A fresh Ed25519 identity key, PEM."""
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric import ed25519
    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())


PEM_PRIVATE = [b'-----BEGIN', b'PRIVATE', b'KEY-----']
PEM_PRIVATE_END = [b'-----END', b'PRIVATE', b'KEY-----']
PKCS8_ED25519 = bytes.fromhex('302e020100300506032b657004220420')


def identity_load(pem):
    """The private key that identity_make() wrote; ValueError if `pem` is none.

    PKCS 8 with an Ed25519 key is a fixed head and the key (RFC 8410).  What
    reads every other kind of key takes a third of a short command to import.
    """
    from cryptography.hazmat.primitives.asymmetric import ed25519
    lines = pem.split()
    if lines[:3] != PEM_PRIVATE or lines[-3:] != PEM_PRIVATE_END:
        raise ValueError
    data = base64.b64decode(b''.join(lines[3:-3]), validate=True)
    if not data.startswith(PKCS8_ED25519):
        raise ValueError
    return ed25519.Ed25519PrivateKey.from_private_bytes(
        data[len(PKCS8_ED25519):])


def raw_public(private):
    """The 32 raw bytes of the public half of an Ed25519 key."""
    public = private.public_key()
    if hasattr(public, 'public_bytes_raw'):         # cryptography >= 40
        return public.public_bytes_raw()
    from cryptography.hazmat.primitives import serialization as ser
    return public.public_bytes(ser.Encoding.Raw, ser.PublicFormat.Raw)


def certificate_make(serial):
    """A self-signed certificate as (key PEM, certificate PEM).

    Nobody checks its dates or names: the identity key vouches for it.
    """
    import datetime
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME,
                                         'tarsnapd')])
    start = datetime.datetime(2020, 1, 1)
    cert = x509.CertificateBuilder(
        name, name, key.public_key(), serial, start,
        start + datetime.timedelta(days=365 * 100)).sign(
            key, hashes.SHA256())
    return (key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8,
                              ser.NoEncryption()),
            cert.public_bytes(ser.Encoding.PEM))


def certificate_serial(path):
    """Serial number of the certificate in a server directory, 0 if none."""
    from cryptography import x509
    try:
        data = read_file(os.path.join(path, 'tls.crt'))
    except FileNotFoundError:
        return 0
    return x509.load_pem_x509_certificate(data).serial_number


def certificate_renew(path):
    """Give the server directory a new certificate, serial + 1."""
    key, cert = certificate_make(certificate_serial(path) + 1)
    write_file(os.path.join(path, 'tls.key'), key)
    write_file(os.path.join(path, 'tls.crt'), cert)


def certificate_der(path):
    """DER of the first certificate in a PEM file."""
    text = read_file(path).decode('ascii', 'replace')
    begin, end = '-----BEGIN CERTIFICATE-----', '-----END CERTIFICATE-----'
    try:
        return base64.b64decode(text.split(begin, 1)[1].split(end, 1)[0])
    except (IndexError, ValueError):
        raise ServerError('%s: no certificate in it' % path) from None


class Indexes:
    """The open indexes of a process, at most 64."""

    MOST = 64

    def __init__(self, directory, store):
        self.directory = directory
        self.store = store
        self.open = collections.OrderedDict()   # machine -> Index, LRU last
        self.making = {}        # machine -> Index that is used instead
        self.lock = threading.Lock()

    def call(self, machine, method, args):
        """Call a method of the machine's index; StoreError if it fails.

        An index file found damaged is thrown away, the next use makes it
        anew.  What it cannot make sense of in the log is Damaged.
        """
        import sqlite3
        while True:
            try:
                index = self._get(machine)
            except (sqlite3.Error, OSError) as e:
                raise StoreError('open index', '%016x' % machine, e) from e
            with index.lock:
                if index.db is None:
                    continue        # closed by another thread just now
                try:
                    return getattr(index, method)(*args)
                except (sqlite3.Error, UnicodeDecodeError) as e:
                    if not isinstance(e, sqlite3.OperationalError):
                        index.remove()
                    raise StoreError('index', '%016x' % machine, e) from e

    def close(self):
        with self.lock:
            for index in self.open.values():
                index.close()
            self.open.clear()

    def path(self, machine):
        return os.path.join(self.directory, '%016x.db' % machine)

    def make(self, machine, run):
        """A new index of a machine, beside the one there is, in which `run`
        is called; it is taken instead unless that knows more of the log.

        `run` returns its State.  (what the new one lacks, in lines, True if
        it was taken, its State, that of the old one).  SQLite and OSErrors
        are StoreErrors.
        """
        import sqlite3
        path = self.path(machine) + '.new'
        for suffix in ('', '-wal', '-shm', '-journal'):
            unlink_quietly(path + suffix)
        try:
            old = self._get(machine)
            new = self.making[machine] = Index(path, True)
            try:
                state = run()
                del self.making[machine]
                lost = ['%s: %s' % pair for pair in new.lost()]
                lost = lost or [state.lost] if state.lost else []
                with old.lock:
                    was = old.state()
                    better = not lost or len(old.lost()) >= len(lost)
                    if better:
                        new.db.backup(old.db)
                        old.doubt, old.fresh = None, False
                return lost, better, state, was
            finally:
                self.making.pop(machine, None)
                new.remove()
        except (sqlite3.Error, OSError) as e:
            raise StoreError('rebuild index', '%016x' % machine, e) from e

    def _get(self, machine):
        with self.lock:
            if machine in self.making:
                return self.making[machine]
            index = self.open.get(machine)
            if index is None or index.db is None:
                index = self.open[machine] = self._open(machine)
            elif index.doubt and time.monotonic() > index.asked + 5:
                self._believe(machine, index)
            self.open.move_to_end(machine)
            while len(self.open) > self.MOST:
                _, oldest = self.open.popitem(last=False)
                with oldest.lock:
                    oldest.close()
            return index

    def _open(self, machine):
        """The machine's Index; one whose file is damaged is made anew."""
        import sqlite3
        index = Index(self.path(machine))
        try:
            self._believe(machine, index)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as e:
            index.close()
            if isinstance(e, sqlite3.OperationalError):
                raise
            index.remove()
            index = Index(self.path(machine))
            self._believe(machine, index)
        return index

    def _believe(self, machine, index):
        """Empty an index that has seen a log other than this one.

        So it is when the store was put back from a copy.  Where the entry that
        would tell cannot be read, the index stays as it is, and in doubt.
        """
        state, index.asked = index.state(), time.monotonic()
        key = log_key(machine, state.k)
        index.doubt = None
        if state.k == 0:
            return
        try:
            data = self.store.get(key)
            if sha256(data) != state.log_hash:
                log_decode(machine, state.k, data)
                index.reset()
        except NoObject:
            index.doubt = (
                '%s: is missing; if the store was put back from an older '
                'copy, "tarsnapd.py rebuild" starts from that' % key)
        except StoreError as e:
            index.doubt = str(e)


# What may be tried at once, and the seconds after which it is one more.
GUESSES = {
    'address': (10, 60),            # wrong passwords
    'account': (100, 36),           # by addresses that are strange to it;
    'pair': (3, 8 * 3600),          # above that, by each of these
    'machines': (1000, 60),         # that an account registers
    'challenges': (200, 10),        # asked for by an address
    'mails': (10, 360),             # that an address has us send
}
FRIEND = 90 * DAY       # seconds for which an address is not strange
MOST_DEBTS = 200000     # rows that are kept


def network(address):
    """What counts as one address: of IPv6 all that one customer gets."""
    import ipaddress
    try:
        found = ipaddress.ip_address(address.partition('%')[0])
    except ValueError:
        return address
    found = getattr(found, 'ipv4_mapped', None) or found
    return str(found) if found.version == 4 else str(
        ipaddress.ip_network((int(found), 48), False))


class Guesses:
    """Who may try how many passwords yet: an SQLite file, for all processes
    and for the time after a restart; disposable.

    A row is a debt that time pays off: `until` is when all of it is.  An
    attempt is charged for before it is judged, so that many at the same time
    count as many; one that is refused costs nothing.

    Nobody can lock out an owner: where strangers guess at an account from
    many addresses, each address still has its few attempts, and one that has
    logged in before has as many as ever.
    """

    def __init__(self, path, secret):
        self.path = path
        self.secret = secret
        self.lock = threading.Lock()
        self.db = None              # opened when first needed

    def charge(self, address, user, now):
        """Seconds to wait, or 0: then one attempt is charged for.

        `address` is None where it is not known, as behind a front.
        """
        who = self._who(address, user)
        limits = ['address', 'pair'] if address else ['account']
        with self._transaction(now):
            debts = {name: self._debt(who[name], name, now)
                     for name in ('address', 'pair', 'account')}
            attacked = self._wait(debts, 'account')
            if address and (not attacked
                            or self._until(who['friend']) > now):
                limits = ['address']
            seconds = max(self._wait(debts, name) for name in limits)
            if not seconds:
                for name, debt in debts.items():
                    most, each = GUESSES[name]
                    self._owe(who[name], now + min(debt + each, most * each))
            return seconds

    def ask(self, address, now, what='challenges'):
        """Seconds to wait until a challenge may be asked for, or 0."""
        who = self._who(address, '')[what]
        with self._transaction(now):
            debts = {what: self._debt(who, what, now)}
            seconds = self._wait(debts, what) if address else 0
            if not seconds:
                self._owe(who, now + debts[what] + GUESSES[what][1])
            return seconds

    def forgive(self, address, user, now):
        """An attempt was right: it costs nothing, and the address is no
        stranger.  It registers a machine: seconds to wait, or 0.
        """
        who = self._who(address, user)
        with self._transaction(now):
            for name in ('address', 'pair', 'account'):
                self._owe(who[name], now + self._debt(who[name], name, now)
                          - GUESSES[name][1])
            if address:
                self._owe(who['friend'], now + FRIEND)
            debts = {'machines': self._debt(who['machines'], 'machines',
                                            now)}
            seconds = self._wait(debts, 'machines')
            if not seconds:
                self._owe(who['machines'], now + debts['machines']
                          + GUESSES['machines'][1])
            return seconds

    def _who(self, address, user):
        """The keys of all rows; no address stands in the file."""
        place = network(address or '').encode('utf-8', 'replace')
        user = user.lower().encode('utf-8', 'replace')
        return {name: hmac.digest(self.secret, b'\0'.join(
            (name.encode(), place * (name not in ('account', 'machines')),
             user * (name not in ('address', 'challenges', 'mails')))),
            'sha256')[:16]
            for name in ('friend', *GUESSES)}

    @staticmethod
    def _wait(debts, name):
        """Seconds until one more attempt would not be too many."""
        most, each = GUESSES[name]
        return max(0, debts[name] + each - most * each)

    def _debt(self, who, name, now):
        """Seconds; the clock may have been set back."""
        most, each = GUESSES[name]
        return min(max(0, self._until(who) - now), most * each)

    def _until(self, who):
        found = self.db.execute('SELECT until FROM debts WHERE who = ?',
                                (who,)).fetchone()
        return found[0] if found else 0

    def _owe(self, who, until):
        self.db.execute('INSERT OR REPLACE INTO debts VALUES (?, ?)',
                        (who, until))

    @contextlib.contextmanager
    def _transaction(self, now):
        """Have the file open and nobody else in it; StoreError."""
        import sqlite3
        with self.lock:
            try:
                if self.db is None:
                    self._open()
                self.db.execute('BEGIN IMMEDIATE')
                try:
                    yield
                    self._pay(now)
                    self.db.execute('COMMIT')
                except BaseException:
                    rollback(self.db)
                    raise
            except (sqlite3.Error, OSError) as e:
                if not isinstance(e, sqlite3.OperationalError):
                    self._close()
                    unlink_quietly(self.path)
                raise StoreError('count', 'guesses', e) from e

    def _pay(self, now):
        """Forget what is paid, and the least of too much."""
        run = self.db.execute
        run('DELETE FROM debts WHERE until < ?', (now,))
        many = run('SELECT count(*) FROM debts').fetchone()[0]
        if many > MOST_DEBTS:
            run('DELETE FROM debts WHERE who IN (SELECT who FROM debts '
                'ORDER BY until LIMIT ?)', (many - MOST_DEBTS // 2,))

    def _open(self):
        import sqlite3
        self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None,
                                  check_same_thread=False)
        os.chmod(self.path, 0o600)
        # A power cut may cost it; it is no loss.
        self.db.execute('PRAGMA synchronous = OFF')
        self.db.execute('CREATE TABLE IF NOT EXISTS debts (who BLOB PRIMARY '
                        'KEY, until INTEGER) WITHOUT ROWID')
        self.db.execute('CREATE INDEX IF NOT EXISTS paid ON debts (until)')

    def _close(self):
        if self.db:
            self.db.close()
            self.db = None

    def close(self):
        with self.lock:
            self._close()


class Strange:
    """Who may name machines that are not there, or sign for one with another
    key, yet: each costs requests to the store of accounts.  In memory of one
    process, and of one thread.
    """

    MOST, EACH = 200, 10        # at once, and seconds for one more
    ROWS = 10000

    def __init__(self):
        self.until = {}         # network -> when its debt is paid

    def wait(self, address, now):
        """Seconds until an address may try again, or 0."""
        debt = self.until.get(network(address), 0) - now
        # The clock may have been set back.
        return max(0, min(debt, self.MOST * self.EACH)
                   + self.EACH - self.MOST * self.EACH)

    def wrong(self, address, now):
        """It has tried one."""
        where = network(address)
        until = max(now, self.until.pop(where, 0)) + self.EACH
        self.until[where] = until       # the last one now
        if len(self.until) > self.ROWS:
            del self.until[next(iter(self.until))]


class Server:
    """An open server directory."""

    _shop = None                        # a Shop, made when first asked for

    def __init__(self, path, complain=None):
        self.path = path
        self.complain = complain        # called with one line, or None
        self.journal = Journal(None)    # another one while it serves
        self.conf = conf_read(path)
        # None where no mail is sent.
        self.post = (Post(self.conf, path) if self.conf.get('mail-from')
                     else None)
        # Of machines registered from now on, in days.
        self.delete_delay = days_parse(self.conf.get('delete-delay', '0'))
        self.open = {}      # (machine, tid) -> Session that has it open
        self.telling = collections.Counter()    # machine -> long answers
        if self.conf.get('read-only', 'no') not in ('yes', 'no'):
            raise ServerError('read-only is yes or no, not %s'
                              % self.conf['read-only'])
        self.frozen = self.conf.get('read-only') == 'yes'   # by its operator
        self.prices = prices_conf(self.conf)    # None: nothing is charged
        if self.conf.get('amnesty', 'no') not in ('yes', 'no'):
            raise ServerError('amnesty is yes or no, not %s'
                              % self.conf['amnesty'])
        self.amnesty = self.conf.get('amnesty') == 'yes'
        self.traffic = Traffic()
        self.cert_hash = ZERO32
        self.serial = 0
        self.temporary = None           # directory to remove at the end
        self.fan = None                 # threads for the wishes of an 'all'
        self.lock = threading.Lock()    # of `fan`
        self.store = self.accounts = store_open(path, self.conf)
        if self.conf.get('accounts'):
            self.accounts = store_open(path, self.conf, name='accounts')
        self.spools = SpoolDir(os.path.join(path, 'spool'))
        self.read_only = not all(os.access(x, os.W_OK) for x in (
            path, self.spools.root)) or not self.store.writable()
        try:
            self._load_keys(path)
            self._load_store(path)
        except OSError as e:
            raise ServerError('%s: %s' % (e.filename or path,
                                          e.strerror)) from None
        except NoObject:
            store_id_missing(self.store)
            raise ServerError('%s: no store there; "tarsnapd.py init" makes '
                              'one' % self.store.name) from None
        except (StoreError, ValueError) as e:
            raise ServerError('%s: %s' % (path, e)) from None

    def _load_keys(self, path):
        for name in ('', 'identity.key', 'secret'):
            file = os.path.join(path, name)
            if os.stat(file).st_mode & 0o022:
                raise ServerError('%s: others can write to it' % file)
        self.secret = read_file(os.path.join(path, 'secret'))
        try:
            self.identity = identity_load(
                read_file(os.path.join(path, 'identity.key')))
        except ValueError:
            raise ServerError('%s/identity.key: not a key' % path) from None
        self.identity_public = raw_public(self.identity)

    def _load_store(self, path):
        self.store_id = store_id_decode(self.store.get('store-id'))
        try:
            if not self.read_only:
                self.store.prepare()
                if self.accounts is not self.store:
                    self.accounts.prepare()
        except Forbidden as e:
            self.read_only = True
            self.perform_here(('log', 'read-only: %s' % e))
        index = os.path.join(path, 'index')
        if self.read_only or not os.access(index, os.W_OK):
            import tempfile
            index = self.temporary = tempfile.mkdtemp(prefix='tarsnapd-')
        self.indexes = Indexes(index, self.store)
        self.guesses = Guesses(os.path.join(path, 'guesses'), self.secret)
        self.strange = Strange()
        self.view = View(os.path.join(
            self.temporary or path, 'ledger.db'))

    def certificate_load(self):
        """Vouch for the certificate that clients will see."""
        front = self.conf.get('front-certificate')
        name = os.path.join(self.path, front or 'tls.crt')
        try:
            self.cert_hash = sha256(certificate_der(name))
        except OSError as e:
            raise ServerError('%s: %s; make one with "tarsnapd.py cert"'
                              % (name, e.strerror)) from None
        self.serial = certificate_serial(self.path)

    def fingerprint(self):
        """What keys are pinned to: 64 hex digits."""
        return sha256(self.identity_public).hex()

    def facts(self):
        """What the account pages may know, as of site_put."""
        return {'fingerprint': self.fingerprint(),
                'prices': self.prices and list(self.prices),
                'amnesty': self.amnesty, 'delete-delay': self.delete_delay,
                'service': self.post.service if self.post else 'tarsnapd',
                'url': self.post.url if self.post else None}

    def vouch(self, cert_hash):
        """The identity's signature in the first frame."""
        return self.identity.sign(b'tarsnap-server-1\0' + self.store_id
                                  + U64.pack(self.serial) + cert_hash)

    def perform(self, wish):
        """Carry out one wish that is neither an answer nor a wait.

        StoreError for whatever goes wrong below.
        """
        verb = wish[0]
        if verb == 'all':
            return self._perform_all(wish[1])
        if verb in STORE_VERBS:
            store = self.store
            if wish[1].partition('/')[0] in ACCOUNT_PLACES:
                store = self.accounts
            return getattr(store, verb)(*wish[1:])
        if verb == 'index':
            return self.indexes.call(wish[1], wish[2], wish[3:])
        if verb == 'view':
            return self.view.call(wish[1], wish[2:])
        if verb == 'guess':
            return getattr(self.guesses, wish[1])(*wish[2:])
        if verb == 'provider':
            return self.shop().ask(*wish[1:])
        if verb == 'spool':
            target = self.spools if wish[1] is None else wish[1]
            try:
                return getattr(target, wish[2])(*wish[3:])
            except OSError as e:
                raise StoreError(wish[2], 'spool', e.strerror) from None
        return self.perform_here(wish)

    def _perform_all(self, wishes):
        """What came of several wishes, in order; StoreErrors among it.

        At the same time where the store is far away, and where a disk has
        to have them: it takes as long for some as for one.
        """
        threads = max(self.store.threads, self.accounts.threads)
        if len(wishes) < 2 or threads < 8 and wishes[0][0] != 'put':
            return [self._perform_quietly(wish) for wish in wishes]
        with self.lock:
            if self.fan is None:
                import concurrent.futures
                self.fan = concurrent.futures.ThreadPoolExecutor(
                    max(threads, 8))
        return list(self.fan.map(self._perform_quietly, wishes))

    def _perform_quietly(self, wish):
        try:
            return self.perform(wish)
        except StoreError as e:
            return e

    def perform_here(self, wish):
        """Carry out a wish that takes no time."""
        if wish[0] == 'now':
            return int(time.time())
        if wish[0] == 'random':
            return os.urandom(wish[1])
        if wish[0] == 'room':
            return LIMIT['read']
        if wish[0] == 'sent':
            return self.traffic.add(*wish[1:])
        assert wish[0] == 'log', wish
        if self.complain:
            self.complain(wish[1])
        return None

    def run(self, steps):
        """Carry out `steps` at once, for a command; what they return."""
        return carry_out(steps, self.perform)

    def url(self, name=''):
        """The address of one of the account pages."""
        return self.conf.get('web-url', '').rpartition('/')[0] + '/' + name

    def shop(self):
        """What can be paid here, a Shop; ServerError.

        Not made before: who serves need not be able to read the keys.
        """
        if self._shop is None:
            if not self.conf.get('pay-keys'):
                raise ServerError('%s: no pay-keys are configured'
                                  % self.path)
            self._shop = Shop(self.conf, self.path, self.url(), self)
        return self._shop

    def traffic_write(self):
        """Have what was sent written down, where somebody pays for it."""
        try:
            if self.prices and not self.read_only:
                self.run(traffic_flush(self.traffic))
        except StoreError as e:
            self.perform_here(('log', str(e)))

    def close(self):
        """Close what is open; if it is not called, only what was sent and is
        not written down is lost.
        """
        self.traffic_write()
        if self.fan:
            self.fan.shutdown()
        self.indexes.close()
        self.guesses.close()
        self.view.close()
        self.store.close()
        self.accounts.close()
        if self.temporary:
            import shutil
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary = None


##############################################################################
# Cleaning, repeated
#
# One process at a time cleans for a server directory: a command.  Under
# `serve`, a thread starts it when it is time, which the time of
# SRV/clean.lock tells: that of the end of the last round.
##############################################################################


class CleanLock:
    """The right to clean for a server directory; close() gives it back."""

    def __init__(self, path):
        self.path = path
        self.file = os.path.join(path, 'clean.lock')
        self.fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                          0o600)
        self.taken = lock_take(self.fd)

    def age(self):
        """Seconds since the last round; or since this is waited for."""
        return time.time() - os.stat(self.file).st_mtime

    def done(self):
        """A round is over."""
        os.utime(self.file)

    def close(self):
        os.close(self.fd)


def clean_conf(conf):
    """(seconds between two rounds, 0 for never, bytes a second)."""
    hours = conf.get('clean-hours', '24')
    try:
        seconds = float(hours) * 3600
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 10 ** 9:
        raise ServerError('clean-hours is a number of hours, not ' + hours)
    return seconds, size_parse(conf.get('clean-rate', '20M'))


class CleanAlways:
    """Has a process clean now and then, until stop()."""

    def __init__(self, server):
        self.server = server
        self.path = server.path
        self.seconds, self.rate = clean_conf(server.conf)
        self.child = None               # subprocess.Popen
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        if self.seconds and not server.read_only:
            CleanLock(self.path).close()        # from now on it has a time
            self.thread.start()

    def stop(self):
        """No more; one that is at it is stopped, which does no harm."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self):
        # Several workers do not all come at once.
        step = min(60, self.seconds / 4)
        pause = step + step * int.from_bytes(os.urandom(2), 'big') / 65536
        while not self.ended.wait(pause):
            try:
                if self._due():
                    self._round()
            except OSError as e:
                self._complain('clean: %s' % e)

    def _due(self):
        return time.time() - os.stat(os.path.join(
            self.path, 'clean.lock')).st_mtime > self.seconds

    def _complain(self, line):
        self.server.perform_here(('log', line))

    def _round(self):
        import subprocess
        import tempfile
        with tempfile.TemporaryFile() as said:
            self.child = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), 'clean',
                 self.path, '--rate', '%d' % self.rate, '--every',
                 '%d' % (self.seconds / 3600)], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=said)
            while self.child.poll() is None:
                if self.ended.wait(0.2):
                    self.child.terminate()
                    self.child.wait()
            said.seek(0)
            for line in said.read(64 * KIB).decode(
                    'utf-8', 'replace').splitlines():
                self._complain('clean: ' + line.partition(': ')[2])


##############################################################################
# Mail: sending
#
# Takes what is due from the queue to a mail server, over SMTP, or to a
# program that takes mail as sendmail does.  One process of a server directory
# at a time: a command, or a thread of `serve`.
##############################################################################

MAIL_TIMEOUT = 60               # seconds that one answer may take


class MailRefused(Exception):
    """A mail that will never be taken."""


class MailLater(Exception):
    """A mail that may be taken later."""


class MailDown(Exception):
    """No mail can be sent now."""


def mail_render(post, path, name, mail):
    """An email.message.EmailMessage; ServerError if a text cannot be used.

    No value can add a header or a line to one: what is not printable, line
    ends among it, is replaced in each; but for MAIL_LINES, which have lines.
    """
    import datetime
    import email.message
    import email.policy
    import email.utils
    import string
    subject, text = mail_text(path, mail['kind'])
    values = {key: '\n'.join(map(printable, value.split('\n')))
              if key in MAIL_LINES else printable(value)
              for key, value in mail['values'].items()}
    values.update(address=mail['to'], service=post.service,
                  url='\n%s\n' % post.url if post.url else '')
    try:
        subject, text = (string.Template(part).substitute(values)
                         for part in (subject, text))
    except (KeyError, ValueError) as e:
        raise ServerError('text of the mail %s: $%s means nothing in it' % (
            mail['kind'], str(e).strip("'"))) from None
    message = email.message.EmailMessage(
        email.policy.SMTP.clone(cte_type='7bit'))
    message['From'] = email.utils.formataddr((post.service, post.sender))
    message['To'] = mail['to']
    message['Subject'] = printable(subject)
    message['Date'] = datetime.datetime.fromtimestamp(
        mail['time'], datetime.timezone.utc)
    message['Message-ID'] = '<%s@%s>' % (name, post.sender.split('@')[1])
    message['Auto-Submitted'] = 'auto-generated'
    if 'leave' in values:
        message['List-Unsubscribe'] = '<%s>' % values['leave']
    plain = text.isascii() and max(map(len, text.split('\n'))) < 900
    message.set_content(text, cte='7bit' if plain else 'quoted-printable')
    return message


def mail_bytes(message):
    """A mail with CR and LF; no line of its head is broken, so that a link in
    one stays whole.
    """
    return message.as_bytes(policy=message.policy.clone(
        max_line_length=998))


def mail_text(path, kind):
    """(subject, body) of a kind of mail, before words are put in."""
    file = os.path.join(path, 'mail', kind)
    if os.path.exists(file):
        return mail_text_read(file)
    return mail_text_parse(file, MAIL_TEXTS[kind])


def mail_text_read(file):
    """(subject, body) in a file."""
    try:
        return mail_text_parse(file, read_file(file).decode('utf-8'))
    except (OSError, UnicodeDecodeError) as e:
        raise ServerError('%s: %s' % (file, getattr(
            e, 'strerror', 'not UTF-8'))) from None


def mail_text_parse(file, text):
    """(subject, body) of what a file says."""
    text = text.replace('\r\n', '\n')
    head, _, body = text.partition('\n\n')
    name, _, subject = head.partition(':')
    if name != 'Subject' or '\n' in head or not body:
        raise ServerError('%s: the first line is not "Subject: ...", or no '
                          'empty one follows' % file)
    return subject.strip(), body


class Courier:
    """The way to a mail server; a context manager, for many mails."""

    def __init__(self, post):
        self.post = post
        self.smtp = None            # smtplib.SMTP while it is connected

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def open(self):
        """Be ready for a mail; MailDown."""
        if self.post.smtp and self.smtp is None:
            import smtplib
            try:
                self.smtp = self._connect(smtplib)
            except ServerError as e:            # of the password's file
                raise MailDown(str(e)) from None
            except (smtplib.SMTPException, OSError, ValueError) as e:
                raise MailDown('%s:%d: %s' % (
                    *self.post.smtp, smtp_reason(e))) from None

    def _connect(self, smtplib):
        import ssl
        post, (host, port) = self.post, self.post.smtp
        context = None
        if post.tls != 'no':
            context = ssl.create_default_context(cafile=post.ca_bundle)
        if post.tls == 'tls':
            smtp = smtplib.SMTP_SSL(host, port, timeout=MAIL_TIMEOUT,
                                    context=context)
        else:
            smtp = smtplib.SMTP(host, port, timeout=MAIL_TIMEOUT)
        try:
            if post.tls == 'starttls':
                smtp.starttls(context=context)
            if post.user:
                smtp.login(post.user, post.password())
        except BaseException:
            smtp.close()
            raise
        return smtp

    def send(self, to, message):
        """Hand over a mail: the server has it on return.

        MailRefused if it will never take it, MailLater if it may; MailDown
        if it takes nothing from us.
        """
        if self.post.smtp:
            self._send_smtp(to, message)
        else:
            self._send_program(to, message)

    def _send_smtp(self, to, message):
        import smtplib
        try:
            self.smtp.sendmail(self.post.bounces, [to], mail_bytes(message))
        except smtplib.SMTPRecipientsRefused as e:
            code, reason = e.recipients[to]
            self._refused(code, reason)
        except smtplib.SMTPSenderRefused as e:
            self.close()
            raise MailDown(smtp_reason(e)) from None
        except smtplib.SMTPDataError as e:
            self._refused(e.smtp_code, e.smtp_error)
        except (smtplib.SMTPException, OSError) as e:
            self.close()
            raise MailLater(smtp_reason(e)) from None

    def _refused(self, code, reason):
        text = '%d %s' % (code, printable(
            reason.decode('utf-8', 'replace')))
        if 500 <= code < 600:
            raise MailRefused(text) from None
        if code == 421:             # it hangs up, too
            self.close()
        raise MailLater(text) from None

    def _send_program(self, to, message):
        import subprocess
        words = [*self.post.program, '-i', '-f', self.post.bounces, to]
        try:
            done = subprocess.run(
                words, input=mail_bytes(message).replace(b'\r\n', b'\n'),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=10 * MAIL_TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise MailDown('%s: %s' % (words[0], getattr(
                e, 'strerror', 'takes too long'))) from None
        if done.returncode:
            text = '%s: status %d: %s' % (
                words[0], done.returncode, printable(' '.join(
                    done.stdout.decode('utf-8', 'replace').split()))[:200])
            # EX_DATAERR, EX_NOUSER, EX_NOHOST of sysexits.h: about this one.
            raise (MailRefused if done.returncode in (65, 67, 68)
                   else MailLater)(text)

    def close(self):
        """End the conversation; nothing is lost by it."""
        if self.smtp:
            import smtplib
            smtp, self.smtp = self.smtp, None
            try:
                smtp.quit()
            except (smtplib.SMTPException, OSError):
                smtp.close()


def smtp_reason(error):
    """An error of a conversation in one line."""
    code, text = (getattr(error, 'smtp_' + name, None)
                  for name in ('code', 'error'))
    if code is not None:
        text = '%d %s' % (code, text.decode('utf-8', 'replace')
                          if isinstance(text, bytes) else text)
    return printable(str(text or error or type(error).__name__))


def mail_run(server, complain):
    """Send what is due; how many mails were sent, or None if another process
    is at it.  `complain` is called with a line for what does not go well.
    """
    lock = os.open(os.path.join(server.path, 'mail.lock'),
                   os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    sent = 0
    try:
        if not lock_take(lock):
            return None
        try:
            server.run(asks_answer(server.post))
        except (ServerError, StoreError) as e:
            complain('mail: %s' % e)
        with Courier(server.post) as courier:
            for key in server.perform(('list', 'mail/due/')):
                try:
                    sent += mail_one(server, courier, key, complain)
                except (ServerError, StoreError) as e:
                    complain('mail: %s' % e)
                except MailDown as e:
                    complain('mail: %s' % e)
                    break
    finally:
        os.close(lock)
    return sent


def mail_one(server, courier, key, complain):
    """Send one mail if it is time to; True if it was sent."""
    name, run = key.rpartition('/')[2], server.run
    mail, tries = run(summed_get(key)), run(mail_ready(name))
    now = server.perform(('now',))
    if mail is None or tries is None:
        return False
    if mail['until'] is not None and mail['until'] <= now:
        run(mail_end(name, mail, 'it came too late to be of use'))
        return False
    true = run(mail_true(mail))
    if not true:
        if true is not None:        # it never was
            run(mail_clear(name))
        return False
    message = mail_render(server.post, server.path, name, mail)
    courier.open()
    if not run(mail_claim(name, mail, tries)):
        return False
    failed = None
    try:
        courier.send(mail['to'], message)
    except MailRefused as e:
        failed = str(e)
    except (MailLater, MailDown) as e:
        if tries + 1 < MAIL_TRIES:
            run(mail_later(name, tries, str(e)))
            if isinstance(e, MailDown):
                raise
            return False
        failed = 'given up: %s' % e
    run(mail_end(name, mail, failed))
    if failed:
        complain('mail %s to %s: %s' % (mail['kind'], mail['to'], failed))
    return not failed


def mail_always(server):
    """Send mail in a thread of this process for as long as it lives."""
    before = []
    while True:
        said = []
        try:
            mail_run(server, said.append)
        except (StoreError, OSError) as e:
            said.append('mail: %s' % e)
        for line in said:
            if line not in before:      # else it would be said each minute
                server.perform_here(('log', line))
        before = said
        time.sleep(60)


##############################################################################
# Scrub, kept and repeated
#
# Where a round stands is in SRV/scrub, whatever ends the process; one process
# at a time scrubs.  Either a command does, or a thread of `serve`.
##############################################################################

SCRUB_SAVE = 10                 # seconds between two writes of SRV/scrub
SCRUB_DAYS = '1'                # from round to round, for `serve`


class ScrubRun:
    """The right to scrub a server directory, and its Scrub; close() it."""

    def __init__(self, server, rate=None):
        self.server = server
        self.path = os.path.join(server.path, 'scrub')
        self.lock = os.open(self.path + '.lock',
                            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not lock_take(self.lock):
            os.close(self.lock)
            raise ServerError('%s: another process scrubs it' % server.path)
        self.scrub = scrub_saved(server.path)
        self.scrub.rate, self.scrub.read_only = rate, server.read_only
        self.when = time.monotonic()            # of the last save

    def run(self, segments=None, heard=None):
        """Go on with the round, or begin one, until its end or for so many
        segments; True if it is over.  `heard` is called with each Damage
        that is new.
        """
        scrub, known = self.scrub, {}
        known.update(self.scrub.damage)
        self.server.run(scrub.begin())
        while True:
            for damage in scrub.damage.values():
                if heard and known.get(damage.key) != damage:
                    heard(damage)
            known.update(scrub.damage)
            if segments is not None and scrub.segments >= segments and (
                    scrub.queue):
                return False
            if time.monotonic() > self.when + SCRUB_SAVE:
                self.save()
            if not self.server.run(scrub.step()):
                return True

    def save(self):
        """Durable on return."""
        write_file(self.path, json.dumps(self.scrub.saved()).encode())
        self.when = time.monotonic()

    def close(self):
        try:
            self.save()
        finally:
            os.close(self.lock)


def scrub_saved(path):
    """The Scrub of a server directory as it was last kept; one that cannot
    be read begins anew.
    """
    try:
        return Scrub(json.loads(read_file(os.path.join(path, 'scrub'),
                                          64 * MIB)))
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return Scrub()


def scrub_conf(conf):
    """(bytes a second, seconds between the starts of two rounds) for `serve`;
    (None, 0) if it does not scrub.
    """
    rate, days = conf.get('scrub-rate'), conf.get('scrub-days', SCRUB_DAYS)
    if not days.isdecimal() or not 0 < int(days) <= MOST_DAYS:
        raise ServerError('scrub-days is a number from 1 to %d, not %s'
                          % (MOST_DAYS, printable(days)))
    return (size_parse(rate), int(days) * DAY) if rate else (None, 0)


def scrub_always(server):
    """Scrub in a thread of this process for as long as it lives, if no other
    process of this directory does.
    """
    rate, again = scrub_conf(server.conf)
    while True:
        try:
            run = ScrubRun(server, rate)
            try:
                wait = 0
                if run.scrub.place is None:
                    wait = run.scrub.started + again - time.time()
                if wait <= 0:
                    run.run(None, lambda damage: server.perform_here(
                        ('log', scrub_line(damage))))
            finally:
                run.close()
        except ServerError:
            pass                        # another one does
        except (StoreError, OSError) as e:
            server.perform_here(('log', 'scrub: %s' % e))
        time.sleep(60)


def scrub_line(damage):
    """A Damage in words."""
    text = 'damaged: %s: %s' % (damage.key, damage.what)
    if damage.machine:
        text += ', of machine %s' % damage.machine
    if damage.blocks:
        text += ', blocks %s' % ' '.join(x[:16] for x in damage.blocks[:4])
    if len(damage.blocks) > 4:
        text += ' and %d more' % (len(damage.blocks) - 4)
    return text


##############################################################################
# Journal
#
# What a server says of itself while it runs: for each event one line of
# NAME=VALUE, to stderr, a file or syslog.  It holds numbers and words of ours
# and nothing a client chose; it never makes the server wait: a line that
# cannot be written at once is lost, and the next one says how many were.
##############################################################################

JOURNAL_LEVELS = ('trouble', 'sessions', 'requests')
SYSLOG = ('/dev/log', '/var/run/log')
DAEMON_INFO, DAEMON_ERROR = 30, 27      # syslog: facility 3, its severities
VALUE_MOST = 300            # characters; with a line of some 2 500 bytes at
#                             most a pipe takes it at once or not at all

# Requests that change something, or prove who asks; the others are looks.
DEEDS = {REGISTER2, AUTH, BEGIN, CHECKPOINT, COMMIT, ABORT, NUKE, REVIVE}
REQUEST_NAMES = {
    HELLO: 'hello', REGISTER1: 'challenge', REGISTER2: 'register',
    AUTH: 'auth', STAT: 'stat', CHANGES: 'changes', LIST: 'list', GET: 'get',
    HAS: 'has', BEGIN: 'begin', PUT: 'put', WITHDRAW: 'withdraw',
    DELETE: 'delete', CHECKPOINT: 'checkpoint', COMMIT: 'commit',
    ABORT: 'abort', NUKE: 'nuke', REVIVE: 'revive',
    ACCOUNT: 'account'}
ERROR_NAMES = {
    E_BAD: 'bad', E_ROLE: 'role', E_CONFLICT: 'conflict', E_EXISTS: 'exists',
    E_NOBLOCK: 'noblock', E_FUNDS: 'funds', E_QUOTA: 'quota',
    E_READONLY: 'readonly', E_BUSY: 'busy', E_EXPIRED: 'expired',
    E_RESYNC: 'resync', E_LOGIN: 'login', E_NOMACHINE: 'nomachine',
    E_MISMATCH: 'mismatch', E_NOARCHIVE: 'noarchive',
    E_INTERNAL: 'internal'}
PLAIN = set('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
            '-_.:/@,+[]*')


def journal_value(value):
    """A value as it stands in a line: bare where it is plain, else a JSON
    string, which has neither line ends nor anything but printable ASCII.
    """
    if isinstance(value, float):
        return '%.3f' % value
    text = str(value)
    if text and not set(text) - PLAIN:
        return text
    return json.dumps(text[:VALUE_MOST]).replace('\x7f', '\\u007f')


def journal_line(pairs):
    """The line for [(name, value)], without its end."""
    return ' '.join('%s=%s' % (name, journal_value(value))
                    for name, value in pairs)


class Journal:
    """Where events go: `where` is stderr, syslog, the path of a file, or None
    for nowhere.

    Shared by the threads of a process, and by processes forked from it: a
    line is one write.
    """

    def __init__(self, where='stderr', level='sessions'):
        if level not in JOURNAL_LEVELS:
            raise ServerError('journal-level is %s, not %s' % (
                ' or '.join(JOURNAL_LEVELS), printable(level)))
        self.where = where
        self.level = JOURNAL_LEVELS.index(level) if where else -1
        self.fd = 2                     # of stderr or the file
        self.sock = None                # to syslog
        self.lost = 0                   # lines since the last one written
        self.lock = threading.Lock()    # of these
        if where not in (None, 'stderr', 'syslog'):
            try:
                self.fd = self._file()
            except OSError as e:
                raise ServerError('journal %s: %s'
                                  % (where, e.strerror)) from None

    def _file(self):
        return os.open(self.where, os.O_WRONLY | os.O_CREAT | os.O_APPEND
                       | os.O_CLOEXEC, 0o640)

    def reopen(self):
        """Begin the file anew if it was moved away; in a signal handler."""
        if self.where in (None, 'stderr', 'syslog'):
            return
        try:
            fd = self._file()
            os.dup2(fd, self.fd, False)
            os.close(fd)
        except OSError as e:            # go on in the old one
            self.trouble('journal %s: %s' % (self.where, e.strerror))

    def wants(self, level):
        """True if lines of `level` are written."""
        return JOURNAL_LEVELS.index(level) <= self.level

    def write(self, event, fields=(), level='sessions'):
        """Say that `event` happened, with (name, value) pairs."""
        if not self.wants(level):
            return
        now = time.time()
        pairs = [('time', '%s.%03dZ' % (time.strftime(
            '%Y-%m-%dT%H:%M:%S', time.gmtime(now)), now % 1 * 1000)),
            ('pid', os.getpid()), ('event', event), *fields]
        lost = self.lost
        if lost:
            pairs.append(('lost', lost))
        try:
            self._put(journal_line(pairs).encode('ascii'), level)
            self.lost -= lost
        except OSError:
            self.lost += 1

    def trouble(self, text, fields=()):
        """Say what is wrong here."""
        self.write('trouble', [*fields, ('text', text)], 'trouble')

    def _put(self, line, level):
        if self.where == 'syslog':
            self._syslog(line, DAEMON_ERROR if level == 'trouble'
                         else DAEMON_INFO)
        # A regular file can always be written, as far as select() goes.
        elif select.select([], [self.fd], [], 0)[1]:
            os.write(self.fd, line + b'\n')
        else:
            raise BlockingIOError

    def _syslog(self, line, priority):
        import socket
        data = b'<%d>tarsnapd[%d]: %b' % (priority, os.getpid(), line)
        with self.lock:
            if self.sock:
                try:
                    self.sock.send(data)
                    return
                except BlockingIOError:
                    raise
                except OSError:         # syslogd was started anew
                    self.sock.close()
                    self.sock = None
            path = next((x for x in SYSLOG if os.path.exists(x)), SYSLOG[0])
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                sock.setblocking(False)
                sock.connect(path)
                sock.send(data)
            except OSError:
                sock.close()
                raise
            self.sock = sock


class Track:
    """What the journal says of one connection; a driver tells it."""

    counter = itertools.count(1)

    __slots__ = ('journal', 'session', 'name', 'address', 'begun', 'came',
                 'went', 'kind', 'rid', 'start', 'size', 'sent', 'result',
                 'more', 'puts', 'put_bytes', 'refused', 'requests')

    def __init__(self, journal, session, address):
        self.journal = journal
        self.session = session
        self.name = '%d-%d' % (os.getpid(), next(self.counter))
        self.address = address
        self.begun = time.monotonic()
        self.came = self.went = 0       # bytes on the wire
        self.kind = None                # of the request that is served
        self.rid = 0                    # its id, which is the client's
        self.start = 0.0                # when it began
        self.size = self.sent = 0       # bytes of its body and its answers
        self.result = 'ok'
        self.more = []                  # pairs about it
        self.puts = self.put_bytes = 0  # since BEGIN or the last commit
        self.refused = 0                # of these, and other errors, since
        self.requests = 0
        journal.write('connect', self.who(), 'requests')

    def who(self):
        """The pairs that begin each line of this connection."""
        pairs = [('connection', self.name), ('address', self.address)]
        if self.session.machine:
            pairs.append(('machine', '%016x' % self.session.machine.number))
        return pairs

    def request(self, kind, rid, body):
        """A request is being served from now on."""
        self.kind, self.rid, self.size = kind, rid, len(body)
        self.start, self.sent, self.result = time.monotonic(), 0, 'ok'
        self.more = []
        self.requests += 1
        if kind == AUTH and len(body) >= AUTH_HEAD.size:
            _, number, role = AUTH_HEAD.unpack_from(body)
            self.more = [('claims', '%016x' % number),
                         ('role', ROLE_LETTER.get(role, '?'))]
        elif kind == BEGIN:
            self.puts = self.put_bytes = self.refused = 0

    def unanswered(self, body):
        """A PUT or the like has come, and will be answered() if refused."""
        self.puts += 1
        self.put_bytes += len(body)
        self.requests += 1

    def answered(self, kind, body, rid=0):
        """An answer was made; `rid` is that of the request it is for."""
        self.sent += len(body)
        if kind == ERROR:
            self._refusal(body, rid)
        elif kind == COMMITTED:
            self.more.append(('commit', U64.unpack_from(body)[0]))
        elif kind == REGISTERED:
            self.more.append(('registered', body[:8].hex()))

    def _refusal(self, body, rid):
        if self.kind is not None:
            (_, self.result), *text = error_pairs(body)
            self.more = [x for x in self.more if x[0] != 'text'] + text
            return
        self.refused += 1
        if self.refused == 1:           # many more puts may be in flight
            self.journal.write('error', self.who() + [('request', rid)]
                               + error_pairs(body))

    def finished(self):
        """The request was served."""
        kind, self.kind = self.kind, None
        if kind is None:
            return
        known = kind in DEEDS or self.result != 'ok'
        level = 'sessions' if known else 'requests'
        if self.journal.wants(level):
            pairs = self.who() + [
                ('request', self.rid), ('type', REQUEST_NAMES.get(kind, kind)),
                ('in', self.size), ('out', self.sent)]
            if kind in (CHECKPOINT, COMMIT):
                pairs += [('puts', self.puts), ('put', self.put_bytes)]
            pairs += [('seconds', time.monotonic() - self.start),
                      ('result', self.result)]
            self.journal.write('request', pairs + self.more, level)
        if kind in (CHECKPOINT, COMMIT) and self.result == 'ok':
            self.puts = self.put_bytes = self.refused = 0

    def trouble(self, text):
        """Something of ours is wrong, met with this connection."""
        pairs = self.who()
        if self.kind is not None:
            pairs.append(('request', self.rid))
        self.journal.trouble(text, pairs)

    def closed(self):
        """The connection is over."""
        self.journal.write('close', self.who() + [
            ('requests', self.requests), ('in', self.came),
            ('out', self.went), ('seconds', time.monotonic() - self.begun)])


def error_pairs(body):
    """What the journal says of the body of an ERROR frame."""
    code = U16.unpack_from(body)[0]
    return [('result', ERROR_NAMES.get(code, code)),
            ('text', body[2:].decode('utf-8', 'replace'))]


##############################################################################
# Drivers, at once
#
# The same Session in the client's own process, or at the end of a pipe (ssh).
# Steps run to their end before anything else happens.
##############################################################################


def drive(server, steps, rid):
    """Run `steps` at once, yielding its answers as (type, id, body)."""
    for wish in turns(steps, server.perform):
        if wish[0] == 'answer':
            yield wish[1], wish[3] if len(wish) > 3 else rid, wish[2]


class Local:
    """A session in this process; see open_local.  One thread at a time."""

    def __init__(self, server, transport, machine=None, roles=None):
        self.server = server
        self.session = Session(server, transport, machine, roles)
        for _ in drive(server, self.session.open(), 0):
            pass
        self.statement = self.session.statement

    @property
    def over(self):
        """True when the session will answer nothing more."""
        return self.session.over

    def receive(self, kind, rid, body):
        """Serve one frame; an iterable of answers (type, id, body).

        What GET and CHANGES answer is made while it is iterated over.
        """
        session = self.session
        if self.server.traffic.due():
            self.server.traffic_write()
        if kind in UNANSWERED:
            error = session.accept(kind, body)
            if error:
                return [(ERROR, rid, error)]
            if session.batch_bytes < MIB:
                return []
            return self.idle()
        answers = drive(self.server, session.handle(kind, body), rid)
        return answers if kind in (GET, CHANGES) else list(answers)

    def idle(self):
        """Write what has been put; answers to send, RECEIVED among them."""
        if not (self.session.batch or self.session.unsaid):
            return []
        return list(drive(self.server, self.session.idle(), 0))

    def yield_wanted(self):
        """Let go of a transaction that another process asks for."""
        session = self.session
        if session.tx and session.tx.spool.wanted():
            session.expire().close()

    def close(self):
        for _ in drive(self.server, self.session.end(), 0):
            pass
        self.server.close()


def open_local(path, create=False, transport='dir', machine=None, roles=None):
    """A session with the server directory `path` in this process.

    With `create` a missing or empty directory becomes a server directory.
    `transport` is 'dir' or 'stdio'; `machine` (number) and `roles` (letters
    of rwdn) limit what may be done.  ServerError, one line, if it cannot be.
    """
    if not is_server(path):
        if not create and not os.path.isdir(path):
            raise ServerError('%s: no such directory' % path)
        if not create:
            raise ServerError('%s: not a server directory' % path)
        server_create(path)
    kinds = {'dir': TRANSPORT_DIR, 'stdio': TRANSPORT_STDIO}
    return Local(Server(path), kinds[transport], machine, roles)


class Pipe:
    """The wire on two descriptors, until the client closes its end."""

    def __init__(self, local, fd_in, fd_out, address='-'):
        self.local = local
        self.fd_in = fd_in
        self.fd_out = fd_out
        self.frames = Frames()
        self.track = Track(local.server.journal, local.session, address)

    def run(self):
        """Serve until end of file or a malformed frame."""
        self._send([(STATEMENT, 0, self.local.statement)])
        try:
            while not self.local.over and self._read():
                self._serve()
        except BrokenPipeError:
            pass
        finally:
            self.local.close()
            self.track.closed()

    def _read(self):
        """Wait for bytes; False at the end.  First say what is received."""
        if not select.select([self.fd_in], [], [], 0)[0]:
            self._send(self.local.idle())
            while not select.select([self.fd_in], [], [], 0.5)[0]:
                self.local.yield_wanted()
                self._send(self.local.idle())
        data = os.read(self.fd_in, 256 * KIB)
        self.frames.buf += data
        self.track.came += len(data)
        return bool(data)

    def _serve(self):
        while not self.local.over:
            self.frames.ceiling = self.local.session.ceiling
            try:
                frame = self.frames.next()
            except Refused as e:
                self._send([(ERROR, 0, error_body(e.code, str(e)))])
                self.local.session.over = True
                return
            if frame is None:
                return
            if frame[0] in UNANSWERED:
                self.track.unanswered(frame[2])
                self._send(self.local.receive(*frame))
            else:
                self.track.request(*frame)
                self._send(self.local.receive(*frame))
                self.track.finished()

    def _send(self, answers):
        for kind, rid, body in answers:
            self.track.answered(kind, body, rid)
            self.track.went += FRAME.size + len(body)
            write_all(self.fd_out, FRAME.pack(len(body), kind, rid) + body)


##############################################################################
# Event loop
#
# One thread owns all connections and runs all sessions; a pool does what
# touches the disk or S3.  What a connection has not asked for is not read: its
# requests wait in its own receive buffer, then in the client's.  A request
# that has begun is run to its end, also if its client has gone.
##############################################################################

LINGER = 2      # seconds a refused client has to read why
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Pool:
    """Threads that perform wishes and put the outcome where the loop looks."""

    def __init__(self, server, threads):
        self.server = server
        self.work = queue.SimpleQueue()
        self.done = collections.deque()     # (connection, steps, value,
        #                                      error)
        self.wake_r, self.wake_w = os.pipe()
        os.set_blocking(self.wake_r, False)
        os.set_blocking(self.wake_w, False)
        self.threads = [threading.Thread(target=self._run, daemon=True)
                        for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def submit(self, conn, wish):
        """Have what the steps of a connection wish done."""
        self.work.put((conn, conn.steps, wish))

    def finished(self):
        """What has been done since the last call."""
        try:
            os.read(self.wake_r, 4096)
        except BlockingIOError:
            pass
        while self.done:
            yield self.done.popleft()

    def close(self, end):
        """Let the threads finish what they have, until `end`.

        One that waits for S3 may take longer, and may be left in the middle.
        """
        for _ in self.threads:
            self.work.put(None)
        for thread in self.threads:
            thread.join(max(0, end - time.monotonic()))
        if not any(thread.is_alive() for thread in self.threads):
            os.close(self.wake_r)
            os.close(self.wake_w)

    def _run(self):
        while True:
            job = self.work.get()
            if job is None:
                return
            value = error = None
            try:
                value = self.server.perform(job[2])
            except Exception as e:      # belongs to the steps that wished it
                error = e
            self.done.append((job[0], job[1], value, error))
            try:
                os.write(self.wake_w, b'.')
            except BlockingIOError:
                pass                    # it is awake


class Strangers:
    """Connections of clients that have not proven who they are, of all workers
    together: memory they share, under a lock that dies with its holder.
    """

    ROW = struct.Struct('>I12s')            # process, hash of an address

    def __init__(self):
        import mmap
        import tempfile
        self.rows = LIMIT['unauthenticated']
        self.file = tempfile.TemporaryFile(prefix='tarsnapd-')
        self.file.truncate(self.rows * self.ROW.size)
        self.table = mmap.mmap(self.file.fileno(),
                               self.rows * self.ROW.size)

    def take(self, address):
        """A row for one more from an address, None if there are too many."""
        where = sha256(network(address).encode('utf-8', 'replace'))[:12]
        with self.file_lock():
            rows = list(self.ROW.iter_unpack(self.table[:]))
            free = next((i for i, row in enumerate(rows) if not row[0]), None)
            if free is None or sum(pid > 0 and there == where for pid, there
                                   in rows) >= (
                    LIMIT['unauthenticated per address']):
                return None
            self.ROW.pack_into(self.table, free * self.ROW.size, os.getpid(),
                               where)
            return free

    def give(self, row):
        """It has gone, or proven who it is."""
        self.ROW.pack_into(self.table, row * self.ROW.size, 0, bytes(12))

    def forget(self, pid):
        """A process has ended with all its connections."""
        with self.file_lock():
            for row in range(self.rows):
                if self.ROW.unpack_from(self.table,
                                        row * self.ROW.size)[0] == pid:
                    self.give(row)

    @contextlib.contextmanager
    def file_lock(self):
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)


class Secure:
    """TLS on a non-blocking socket, as much of ssl.SSLSocket as we use.

    An SSLSocket's read goes on for as long as records come that hold nothing
    for us, such as a new key each: whoever sends these fast has the loop for
    himself.  This one gives TLS a few records at a time, and ends it, with an
    OSError, when nothing comes of many.  Once they were full it asks the
    system for more at once, but not TLS, whose buffers never shrink: 128 KiB
    both ways would stay 400 KiB of each connection for good.
    """

    __slots__ = ('sock', 'tls', 'incoming', 'outgoing', 'unsent', 'owed',
                 'nothing', 'taken', 'came', 'filled', 'useful', 'shaken',
                 'want_read', 'want_write')

    def __init__(self, sock, context):
        import ssl
        self.want_read = ssl.SSLWantReadError
        self.want_write = ssl.SSLWantWriteError
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, True)
        self.unsent = memoryview(b'')   # records, to be sent first
        self.owed = 0           # what of send()'s data is in them
        self.nothing = 0        # bytes taken since there was one for us
        self.taken = 0          # bytes that came
        self.came = memoryview(b'')     # of these, not given to TLS yet
        self.filled = 0         # of these the last time,
        self.useful = 0         # and what was in them for us
        self.shaken = False     # the handshake is over

    def fileno(self):
        return self.sock.fileno()

    def do_handshake(self):
        while not (self.shaken and self._flush()):
            if not self._flush():
                raise self.want_write
            try:
                self.tls.do_handshake()
                self.shaken, self.nothing = True, 0
            except self.want_read:
                if not self.outgoing.pending and not self._fill():
                    raise ConnectionAbortedError from None

    def recv_into(self, room):
        """Bytes put into `room`, 0 at the end; BlockingIOError."""
        if self.tls is None:
            return self.sock.recv_into(room)
        while True:
            try:
                count = self.tls.read(len(room), room)
            except self.want_read:
                if not self._fill():
                    return 0
                continue
            self.nothing = 0
            self.useful += count
            return count

    def send(self, data):
        """How much was sent.  After a BlockingIOError it must be called with
        the same bytes.
        """
        if not self.owed:
            self._seal(data[:LIMIT['full records']])
        if not self._flush():
            raise BlockingIOError
        owed, self.owed = self.owed, 0
        return owed

    def _seal(self, data):
        """Put `data` into records, after what is unsent."""
        records, step = [bytes(self.unsent)], 2 * LIMIT['records']
        for at in range(0, len(data), step):
            self.owed += self.tls.write(data[at:at + step])
            records.append(self.outgoing.read())
        self.unsent = memoryview(b''.join(records))

    def shutdown(self, how):
        """Say no more; what comes is not looked into."""
        self.tls = None
        self.sock.shutdown(how)

    def close(self):
        try:
            self._flush()               # an alert that says what is wrong
        except OSError:
            pass
        self.sock.close()

    def _fill(self):
        """Take what has come, some of it; False at its end."""
        if self.nothing > LIMIT['records for nothing']:
            raise ConnectionAbortedError('records of nothing')
        if not self.came:
            full = self.filled >= LIMIT['records'] and \
                self.useful > self.filled // 2
            data = self.sock.recv(LIMIT['full records' if full
                                        else 'records'])
            self.filled, self.useful = len(data), 0
            self.taken += len(data)
            self.came = memoryview(data)
        some = self.came[:LIMIT['records']]
        self.came = self.came[len(some):]
        self.nothing += len(some)
        self.incoming.write(some)
        return bool(some)

    def _flush(self):
        """Send records; False if not all can go now."""
        while self.unsent or self.outgoing.pending:
            self.unsent = self.unsent or memoryview(self.outgoing.read())
            try:
                self.unsent = self.unsent[self.sock.send(self.unsent):]
            except BlockingIOError:
                return False
        return True


class Connection:
    """What the loop knows of one client."""

    __slots__ = ('sock', 'address', 'frames', 'session', 'steps', 'rid',
                 'flushing', 'paused', 'out', 'out_bytes', 'sending',
                 'secure', 'shaking', 'more', 'gone', 'ended', 'hanging',
                 'deadline', 'moved', 'held', 'interest', 'track', 'row',
                 'requests', 'number')

    def __init__(self, sock, address, row, session, secure, now):
        self.sock = sock
        self.address = address
        self.row = row              # among Strangers, or None
        self.track = Track(session.server.journal, session, address)
        self.frames = Frames()      # received and not yet taken
        self.requests = 0           # taken
        self.number = 0             # later ones have higher ones
        self.session = session
        self.steps = None           # running generator
        self.rid = 0                # of the request it serves
        self.flushing = False       # it writes the batch; puts may go on
        self.paused = False         # it waits for room in `out`
        self.out = collections.deque()
        self.out_bytes = 0          # in out and in sending
        self.sending = memoryview(b'')
        self.secure = secure        # TLS
        self.shaking = secure       # its handshake is not over
        self.more = False           # reading stopped before it ran dry
        self.gone = False           # the socket is closed
        self.ended = False          # session.end() was started
        self.hanging = False        # all is said; waiting for its end
        self.deadline = now + LIMIT['seconds to authenticate']
        self.moved = now            # when it last took what we sent
        self.held = 0               # its share of the common budget
        self.interest = 0           # what the selector watches

    def send(self, kind, rid, body):
        """Queue a frame."""
        if not self.gone:
            self.out.append(FRAME.pack(len(body), kind, rid))
            self.out.append(body)
            self.out_bytes += FRAME.size + len(body)

    def gather(self):
        """Have up to 256 KiB in `sending`; False if there is nothing.

        A TLS write that must be repeated is repeated with the same bytes.
        """
        if not self.sending:
            pieces, size = [], 0
            while self.out and size < 256 * KIB:
                pieces.append(self.out.popleft())
                size += len(pieces[-1])
            self.sending = memoryview(b''.join(pieces))
        return bool(self.sending)


class Loop:
    """Serves a listening socket until stop() is called."""

    def __init__(self, server, listener, context, strangers, parent=None):
        import selectors
        import ssl
        self.server = server
        self.listener = listener
        self.strangers = strangers      # Strangers, of all workers
        self.parent = parent            # process whose end is ours, or None
        self.context = context          # ssl.SSLContext, or None behind one
        self.want_more = (BlockingIOError, InterruptedError,
                          ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self.want_write = ssl.SSLWantWriteError
        self.read_event = selectors.EVENT_READ
        self.write_event = selectors.EVENT_WRITE
        self.selector = selectors.DefaultSelector()
        self.pool = Pool(server, server.store.threads)
        self.connections = set()
        self.timers = []        # heap of (when, number, connection, steps)
        self.numbers = itertools.count()
        self.now = time.monotonic()
        self.checked = self.now         # when deadlines were last looked at
        self.held = 0                   # bytes in all buffers
        self.favoured = None            # may read although held is too much
        self.refused = 0                # connections, not yet in the journal
        self.refused_last = ''          # address of the last of them
        self.accepting = True           # False for a moment without room
        self.due = set()                # whose turn it is again
        self.stopping = 0               # 0, or when to stop at the latest
        self.room = memoryview(bytearray(256 * KIB))    # to receive into

    def stop(self):
        """Take no more; what was received is finished.  Signal safe."""
        if not self.stopping and not self.parent:
            manager_tell('STOPPING=1')
        self.stopping = self.stopping or (
            time.monotonic() + LIMIT['seconds to finish'])
        try:
            os.write(self.pool.wake_w, b'.')
        except OSError:
            pass

    def run(self):
        """Until stop() and all is finished."""
        self.listener.setblocking(False)
        self.selector.register(self.listener, self.read_event, self.accept)
        self.selector.register(self.pool.wake_r, self.read_event, None)
        listening = True
        while True:
            if self.stopping and listening:
                listening = False
                if self.accepting:
                    self.selector.unregister(self.listener)
                self.listener.close()
            if self.stopping and self.settled():
                break
            self.turn()
        for conn in list(self.connections):
            self.hang_up(conn)
        self.pool.close(self.stopping)
        self.selector.close()

    def settled(self):
        """True when stopping and nothing is left to do, or no time."""
        for conn in list(self.connections):
            if (conn.steps is None and not conn.out_bytes
                    and not conn.session.batch):
                self.hang_up(conn)
        return not self.connections or time.monotonic() > self.stopping

    def turn(self):
        """Wait for something to happen, and deal with it."""
        ready = [c for c in self.connections if c.more and self.may_read(c)]
        due, self.due = self.due, set()
        timeout = 0 if ready or due else 1
        if self.timers:
            timeout = min(timeout, max(0, self.timers[0][0]
                                       - time.monotonic()))
        events = self.selector.select(timeout)
        self.now = time.monotonic()
        for key, mask in events:
            if key.data == self.accept:
                self.accept()
            elif key.data is not None:
                self.guard(key.data, self.on_event, mask)
        for conn, steps, value, error in self.pool.finished():
            if conn.steps is steps:
                self.guard(conn, self.resume, value, error)
        for conn in ready:
            if conn.more:
                self.guard(conn, self.on_event, self.read_event)
        for conn in due:
            self.guard(conn, self.advance)
        while self.timers and self.timers[0][0] <= self.now:
            _, _, conn, steps = heapq.heappop(self.timers)
            if conn.steps is steps:
                self.guard(conn, self.resume)
        if self.now >= self.checked + 0.5:
            self.checked = self.now
            self.check_deadlines()
            if self.server.traffic.due():
                threading.Thread(target=self.server.traffic_write,
                                 daemon=True).start()
            if not self.accepting and not self.stopping:
                self.accepting = True
                self.selector.register(self.listener, self.read_event,
                                       self.accept)
            self.say_refused()
            if self.parent and os.getppid() != self.parent:
                self.stop()             # it was killed: leave its port free

    def guard(self, conn, method, *args):
        """Call a method for a connection; an error costs it, not the rest."""
        try:
            method(conn, *args)
        except OSError:
            self.hang_up(conn)
        except Exception as e:
            conn.track.trouble('%s: %s' % (type(e).__name__, e))
            conn.steps = None
            self.hang_up(conn)
        self.account(conn)

    def accept(self):
        """Take new connections, as many as may be unauthenticated."""
        import socket
        for _ in range(16):
            try:
                sock, address = self.listener.accept()
            except OSError as e:
                if e.errno in NO_ROOM and self.accepting:
                    # Without this it would be asked again at once.
                    self.accepting = False
                    self.selector.unregister(self.listener)
                return
            row = self.strangers.take(address[0])
            if row is None and self.make_room(address[0]):
                row = self.strangers.take(address[0])
            if row is None:
                sock.close()
                self.refused += 1
                self.refused_last = address[0]
                continue
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if self.context:
                    sock = Secure(sock, self.context)
            except OSError:             # it has hung up already
                sock.close()
                self.strangers.give(row)
                continue
            self.welcome(sock, address[0], row)

    def make_room(self, address):
        """Hang up on the stranger that has been here longest: of this address
        if it has too many, or else of all.  False if there is none.

        So whoever floods keeps nobody out who is quick to say who he is.  One
        that is at work on a challenge goes last, as that takes its time.
        """
        strangers = [c for c in self.connections if c.row is not None]
        same = [c for c in strangers
                if network(c.address) == network(address)]
        if len(same) >= LIMIT['unauthenticated per address']:
            strangers = same
        idle = [c for c in strangers if c.steps is None]
        if idle:
            self.refused += 1
            self.refused_last = address
            self.guard(min(idle, key=lambda c: (
                c.session.register1 is not None, not c.shaking,
                c.number)), self.hang_up)
        return bool(idle)

    def welcome(self, sock, address, row):
        """Begin a session."""
        # Behind a front nobody's address is known.
        session = Session(self.server, TRANSPORT_TLS,
                          address=address if self.context else None)
        conn = Connection(sock, address, row, session, bool(self.context),
                          self.now)
        self.connections.add(conn)
        conn.number = next(self.numbers)
        conn.interest = self.read_event
        self.selector.register(sock, conn.interest, conn)
        if not conn.shaking:
            self.guard(conn, self.start, session.open(), 0)
            self.guard(conn, self.advance)

    def on_event(self, conn, mask):
        """The socket can be read or written."""
        if conn.gone:
            return
        if conn.shaking:
            self.shake(conn)
            return
        if mask & self.write_event or conn.out_bytes:
            self.write(conn)
        if mask & self.read_event and (conn.hanging or self.may_read(conn)):
            self.read(conn)
        self.advance(conn)

    def shake(self, conn):
        """Go on with the TLS handshake."""
        try:
            conn.sock.do_handshake()
        except self.want_write:
            self.watch(conn, self.write_event)
        except self.want_more:
            self.watch(conn, self.read_event)
        else:
            conn.shaking = False
            conn.more = True            # what came with its end
            self.start(conn, conn.session.open(), 0)
            self.advance(conn)

    def read(self, conn):
        """Receive until it runs dry or others should have their turn."""
        size, conn.more = 0, False
        end = time.monotonic() + LIMIT['seconds at once']
        while not conn.gone:
            try:
                count = conn.sock.recv_into(self.room)
            except self.want_more:
                return
            if count == 0 or self.too_much(conn):
                self.hang_up(conn)
                return
            size += count
            enough = size >= LIMIT['read at once'] or time.monotonic() > end
            if conn.hanging:            # it is thrown away
                if enough:
                    return
                continue
            conn.frames.buf += self.room[:count]
            conn.track.came += count
            if enough or not self.may_read(conn):
                conn.more = True
                return

    @staticmethod
    def too_much(conn):
        """True for a stranger who sends more than all it could ask."""
        return conn.secure and not conn.session.machine and (
            conn.sock.taken > LIMIT['received unauthenticated'])

    def write(self, conn):
        """Send what is queued, as far as the socket takes it."""
        while conn.gather():
            try:
                count = conn.sock.send(conn.sending)
            except self.want_more:
                return
            conn.sending = conn.sending[count:]
            conn.out_bytes -= count
            conn.track.went += count
            conn.moved = self.now
        if conn.paused:
            conn.paused = False
            self.resume(conn)

    def may_read(self, conn):
        """True if there is room for more from this connection."""
        return (not self.stopping and not conn.session.over
                and not conn.hanging and not conn.gone
                and len(conn.frames.buf) < max(LIMIT['unparsed'],
                                               conn.frames.wanted())
                and (self.held < LIMIT['all connections']
                     or conn is self.favoured))

    def advance(self, conn):
        """Begin what can be begun, then watch for what is needed."""
        session, taken = conn.session, 0
        while conn.steps is None or conn.flushing:
            if conn.steps is None and (
                    session.batch_bytes >= LIMIT['batch']):
                self.start(conn, session.idle(), 0, True)
            elif taken == LIMIT['frames at once']:
                self.due.add(conn)
                break
            elif not self.take(conn):
                break
            taken += 1
        if conn.steps is None and (session.unsaid or session.batch and (
                not conn.more or self.stopping)):
            # The client may be waiting for its window.
            self.start(conn, session.idle(), 0, True)
        if conn.steps is None and not conn.ended and (
                conn.gone or session.over):
            conn.ended = True
            self.start(conn, session.end(), 0)
        if conn.ended and conn.gone and conn.steps is None:
            self.connections.discard(conn)
        if conn.out_bytes and not conn.gone:
            self.write(conn)
        self.part(conn)
        self.watch_all(conn)

    def take(self, conn):
        """Take the next frame, if there is one that can be served now."""
        session = conn.session
        # PUTs without a transaction are answered too, each with an ERROR.
        if session.over or conn.gone and conn.ended or (
                conn.out_bytes > LIMIT['out']):
            return False
        conn.frames.ceiling = session.ceiling
        try:
            kind = conn.frames.peek()
        except Refused as e:
            session.over = True
            error = error_body(e.code, str(e))
            conn.track.answered(ERROR, error)
            conn.send(ERROR, 0, error)
            return False
        if kind is None or conn.flushing and (
                kind not in UNANSWERED
                or session.batch_bytes >= LIMIT['batch in memory']):
            return False
        kind, rid, body = conn.frames.next()
        conn.requests += 1
        if conn.requests > LIMIT['requests unauthenticated'] and (
                not session.machine):
            session.over = True
            conn.send(ERROR, rid, error_body(E_BAD, 'who are you?'))
            return False
        if kind in UNANSWERED:
            error = session.accept(kind, body)
            conn.track.unanswered(body)
            if error:
                conn.track.answered(ERROR, error, rid)
                conn.send(ERROR, rid, error)
        else:
            conn.track.request(kind, rid, body)
            self.start(conn, session.handle(kind, body), rid)
        return True

    def start(self, conn, steps, rid, flushing=False):
        """Run steps for a connection as far as they go."""
        assert conn.steps is None
        conn.steps, conn.rid, conn.flushing = steps, rid, flushing
        self.step(conn, None, None)

    def resume(self, conn, value=None, error=None):
        """What the steps waited for has happened."""
        if conn.steps is not None:
            self.step(conn, value, error)
        self.advance(conn)

    def step(self, conn, value, error):
        """Run the steps until they must wait or are over."""
        steps = conn.steps
        while True:
            try:
                wish = steps.throw(error) if error else steps.send(value)
            except StopIteration:
                conn.steps, conn.flushing = None, False
                conn.track.finished()
                return
            value = error = None
            if wish[0] == 'answer':
                conn.track.answered(wish[1], wish[2])
                conn.send(wish[1], wish[3] if len(wish) > 3 else conn.rid,
                          wish[2])
                if conn.out_bytes > LIMIT['out in a crowd'
                                          if self.crowded() else 'out']:
                    conn.paused = True
                    return
            elif wish[0] == 'room':
                value = LIMIT['read in a crowd' if self.crowded()
                              else 'read']
                # At once: many may ask in one turn.
                conn.held += value
                self.held += value
            elif wish[0] == 'wait':
                heapq.heappush(self.timers, (
                    self.now + wish[1], next(self.numbers), conn, steps))
                return
            elif wish[0] == 'log':
                conn.track.trouble(wish[1])
            elif wish[0] in ('now', 'random', 'sent'):
                value = self.server.perform_here(wish)
            else:
                self.pool.submit(conn, wish)
                return

    def crowded(self):
        """True if much is held; then nobody is to hold more than a little,
        and who does not take what he asked for is let go.
        """
        return self.held > LIMIT['all connections'] // 2

    def part(self, conn):
        """Once all is said to a client we want no more of, hang up.

        Closing at once with its requests unread would reset the connection
        and lose it our reason.
        """
        if (conn.session.over and conn.steps is None and not conn.gone
                and not conn.out_bytes and not conn.hanging):
            import socket
            conn.hanging = True
            conn.deadline = self.now + LINGER
            conn.sock.shutdown(socket.SHUT_WR)

    def hang_up(self, conn):
        """Close the socket; the session ends when its request is over."""
        if not conn.gone:
            conn.gone = True
            conn.track.closed()
            if conn.interest:
                self.selector.unregister(conn.sock)
            conn.sock.close()
            conn.out.clear()
            conn.sending, conn.out_bytes = memoryview(b''), 0
            conn.frames.buf = bytearray()
        if conn.paused:
            conn.paused = False
            self.guard(conn, self.resume)
        elif conn.steps is None:
            self.guard(conn, self.advance)

    def watch_all(self, conn):
        """Watch a connection for what it is good for now."""
        if conn.gone or conn.shaking:
            return
        interest = 0
        if conn.hanging or self.may_read(conn):
            interest |= self.read_event
        if conn.out_bytes:
            interest |= self.write_event
        self.watch(conn, interest)

    def watch(self, conn, interest):
        """Have the selector watch for `interest`, which may be nothing."""
        if interest == conn.interest:
            return
        if not interest:
            self.selector.unregister(conn.sock)
        elif not conn.interest:
            self.selector.register(conn.sock, interest, conn)
        else:
            self.selector.modify(conn.sock, interest, conn)
        conn.interest = interest

    def account(self, conn):
        """Keep the common budget, and somebody reading when it is spent."""
        if conn.row is not None and (conn.gone or conn.session.machine):
            self.strangers.give(conn.row)
            conn.row = None
        held = 0
        if conn in self.connections:
            held = (len(conn.frames.buf) + conn.session.batch_bytes
                    + conn.session.writing + conn.session.reading
                    + conn.out_bytes)
        before = self.held
        self.held += held - conn.held
        conn.held = held
        most = LIMIT['all connections']
        if self.held < most <= before:
            self.favoured = None
            for other in self.connections:
                self.watch_all(other)
        elif self.held >= most and (
                self.favoured not in self.connections):
            # The one that is nearest to a whole request.
            self.favoured = max(self.connections,
                                key=lambda c: len(c.frames.buf), default=None)
            if self.favoured:
                self.watch_all(self.favoured)

    def say_refused(self):
        """One line for all since the last: a flood must not become one."""
        if self.refused:
            self.server.journal.write('refuse', [
                ('count', self.refused), ('address', self.refused_last)])
            self.refused = 0

    def check_deadlines(self):
        """Let go of clients that are late, and of what others want."""
        for conn in list(self.connections):
            late = conn.hanging or not conn.session.machine
            stuck = conn.out_bytes and self.now > conn.moved + LIMIT[
                'seconds to drain in a crowd' if self.crowded()
                else 'seconds to drain']
            if not conn.gone and (late and self.now > conn.deadline or stuck):
                self.hang_up(conn)
            if not conn.out_bytes:
                conn.moved = self.now
            if conn.session.unsaid and conn.steps is None:
                self.guard(conn, self.advance)
        for session in list(self.server.open.values()):
            if session.tx and not session.busy and (
                    session.tx.spool.wanted()):
                session.expire().close()


def listen(address):
    """A listening socket at HOST:PORT; ServerError if it cannot be had."""
    import socket
    host, _, port = address.rpartition(':')
    host = host.strip('[]')
    if not port.isdigit() or int(port) > 65535:
        raise ServerError('listen address %s is not HOST:PORT' % address)
    try:
        found = socket.getaddrinfo(host or '::', int(port), 0,
                                   socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        return listen_at(socket, found[0])
    except OSError as e:
        if host in ('', '::') and e.errno in (errno.EAFNOSUPPORT,
                                              errno.EADDRNOTAVAIL):
            return listen('0.0.0.0:' + port)
        raise ServerError('cannot listen on %s: %s'
                          % (address, e.strerror or e)) from None


def listen_at(socket, found):
    """A listening socket for one answer of getaddrinfo."""
    sock = socket.socket(found[0], socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if found[0] == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(found[4])
        sock.listen(1024)
    except BaseException:
        sock.close()
        raise
    return sock


def tls_context(path):
    """The SSLContext of a server directory: TLS 1.3, no resumption."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    try:
        context.load_cert_chain(os.path.join(path, 'tls.crt'),
                                os.path.join(path, 'tls.key'))
    except (OSError, ssl.SSLError) as e:
        raise ServerError('%s: tls.crt and tls.key: %s'
                          % (path, e.strerror or e)) from None
    return context


def listener_given():
    """The listening socket that a service manager passes, or None: systemd's
    LISTEN_FDS, sd_listen_fds(3).  It outlives this process, so that from its
    end to the start of the next one clients wait and are not refused.
    """
    import socket
    given = {name: os.environ.pop(name, '') for name in (
        'LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES')}
    if given['LISTEN_PID'] != str(os.getpid()):
        return None
    if given['LISTEN_FDS'] != '1':
        raise ServerError('%s sockets were passed by LISTEN_FDS, one is wanted'
                          % printable(given['LISTEN_FDS']))
    try:
        sock = socket.socket(fileno=3)
        good = sock.type == socket.SOCK_STREAM and sock.family in (
            socket.AF_INET, socket.AF_INET6) and sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as e:
        raise ServerError('descriptor 3, passed by LISTEN_FDS: %s'
                          % e.strerror) from None
    if not good:
        raise ServerError('descriptor 3, passed by LISTEN_FDS, is no '
                          'listening TCP socket')
    sock.set_inheritable(False)
    return sock


def manager_tell(state):
    """Tell a service manager that waits for it: sd_notify(3)."""
    import socket
    path = os.environ.get('NOTIFY_SOCKET', '')
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(state.encode(), '\0' + path[1:] if path[0] == '@'
                            else path)
            except OSError as e:
                say('NOTIFY_SOCKET: %s' % (e.strerror or e))


def announce(server, listener, workers=1):
    """Say that clients, and signals, may come."""
    host, port = listener.getsockname()[:2]
    address = '%s:%d' % ('[%s]' % host if ':' in host else host, port)
    with contextlib.suppress(OSError):      # who only serves need not write
        write_file(os.path.join(server.path, 'address'), (
            address + '\n').encode())
    say('listening on ' + address)
    server.journal.write('start', [
        ('version', VERSION), ('address', address), ('workers', workers),
        ('store', server.store.name)])
    manager_tell('READY=1')


def serve_one(server, listener, context, strangers, parent=None):
    """Serve in this process until SIGTERM or SIGINT, or until `parent`, if
    it is one of several, has ended.
    """
    import signal
    # A thread of the pool must not hold the loop up for the default 5 ms.
    sys.setswitchinterval(0.0005)
    loop = Loop(server, listener, context, strangers, parent)
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        signal.signal(number, lambda *_: loop.stop())
    signal.signal(signal.SIGHUP, lambda *_: server.journal.reopen())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*signals, signal.SIGHUP))
    if not parent:
        announce(server, listener)
    if scrub_conf(server.conf)[0] and not server.read_only:
        threading.Thread(target=scrub_always, daemon=True,
                         args=(server,)).start()
    if server.post and not server.read_only:
        threading.Thread(target=mail_always, daemon=True,
                         args=(server,)).start()
    cleaning = CleanAlways(server)
    loop.run()
    cleaning.stop()
    server.close()
    if not parent:
        server.journal.write('stop')


def serve_many(server, listener, context, workers):
    """Serve in `workers` processes, replacing those that die."""
    import signal
    children, stopping, strangers = set(), [], Strangers()

    def stop(*_):
        stopping.append(True)
        manager_tell('STOPPING=1')
        for child in children:
            os.kill(child, signal.SIGTERM)

    def reopen(*_):
        server.journal.reopen()
        for child in children:
            os.kill(child, signal.SIGHUP)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in signals:
        signal.signal(number, reopen if number == signal.SIGHUP else stop)
    announce(server, listener, workers)
    births = 0
    while children or not stopping:
        while len(children) < workers and not stopping:
            # One that dies at once must not make us a fork bomb.
            time.sleep(0.1 if births >= workers else 0)
            births += 1
            # No signal may come between a child's birth and our knowing it,
            # nor reach the child while it still has our handler.
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            parent = os.getpid()
            child = None if stopping else os.fork()
            if child == 0:
                serve_child(server, listener, context, strangers, parent)
            children.update([child] if child else [])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        try:
            child, status = os.wait()
        except ChildProcessError:
            continue
        children.discard(child)
        strangers.forget(child)
        if not stopping:
            server.journal.trouble('worker %d ended by itself, status %d'
                                   % (child, status))
    server.journal.write('stop')


def serve_child(server, listener, context, strangers, parent):
    """A worker process; does not return."""
    status = 1
    try:
        serve_one(server, listener, context, strangers, parent)
        status = 0
    finally:
        os._exit(status)


##############################################################################
# Canary
#
# A client of a few lines, with a machine of its own, that finds out whether a
# server works: through the front door, as every client comes, it has a block
# stored, read and deleted.  Shares with the server above only constants, the
# frame and live_digest().  Archives of it are one record each, whose bytes are
# made from its key; one stays, to see that what is stored stays.
##############################################################################

CANARY_FIELDS = ('fingerprint', 'store', 'machine', 'read', 'write', 'delete')
CANARY_SIZE = 16 * KIB      # bytes of its block
CANARY_OLD = 3600           # seconds; what it left before is given up then
CANARY_TRIES = 10           # while others with the same key commit too


class CanaryDead(Exception):
    """The service does not work; str() says why, in one line."""


class CanaryRefused(CanaryDead):
    """The server answered with a typed error."""

    def __init__(self, body):
        self.code = U16.unpack_from(body)[0]
        super().__init__('refused: %s' % printable(
            body[2:].decode('utf-8', 'replace')))


class CanaryKey:
    """The machine a canary is, and what it knows its server by."""

    def __init__(self, values):
        from cryptography.hazmat.primitives.asymmetric import ed25519
        values = {name: bytes.fromhex(values[name]) for name in CANARY_FIELDS}
        self.fingerprint = values['fingerprint']
        self.store = values['store']
        self.machine, = U64.unpack(values['machine'])
        self.private = {role: ed25519.Ed25519PrivateKey.from_private_bytes(
            values[name]) for role, name in (
                (ROLE_READ, 'read'), (ROLE_WRITE, 'write'),
                (ROLE_DELETE, 'delete'))}
        self.secret = hmac.digest(values['write'], b'canary', 'sha256')

    def name(self, data):
        return hmac.digest(self.secret, data, 'sha256')

    def record(self, archive):
        """The (name, sealed block) that archive id `archive` consists of."""
        sizes = (64, 64, CANARY_SIZE - 128)
        noise = hashlib.shake_256(self.secret + archive)
        noise = noise.digest(32 + sum(sizes))
        block = BLOCK_HEAD.pack(1, RECORD, len(sizes), noise[:32])
        at = 32
        for recipient, size in zip(RECIPIENTS[RECORD], sizes):
            block += PART_HEAD.pack(recipient, size) + noise[at:at + size]
            at += size
        return self.name(block), block


def canary_make(server, path):
    """A new canary of the machine's own operator; the file `path` is its key.

    Durable on return.  No password is needed: who can do this could write to
    the files.
    """
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric import ed25519
    pairs = [ed25519.Ed25519PrivateKey.generate() for _ in range(4)]
    public = b''.join(map(raw_public, pairs))
    secrets = [x.private_bytes(ser.Encoding.Raw, ser.PrivateFormat.Raw,
                               ser.NoEncryption()).hex() for x in pairs]
    # The fourth, which could delete everything, is nowhere from now on.
    number = server.run(machine_create('', 'canary', public))
    values = dict(zip(CANARY_FIELDS, [
        server.fingerprint(), server.store_id.hex(), '%016x' % number,
        *secrets]))
    write_file(path, json.dumps(values, indent=1).encode() + b'\n')


def canary_load(path):
    """The CanaryKey in a file; ServerError if there is none in it."""
    try:
        return CanaryKey(json.loads(read_file(path)))
    except OSError as e:
        raise ServerError('%s: %s' % (path, e.strerror)) from None
    except (ValueError, KeyError, TypeError, struct.error):
        raise ServerError('%s: not the key of a canary, as tarsnapd check SRV '
                          'leaves one in SRV/canary.key' % path) from None


class CanaryLine:
    """Frames over TLS to a server, until a time after which it is dead."""

    def __init__(self, address, seconds):
        import socket
        import ssl
        self.address = address
        self.end = time.monotonic() + seconds
        self.seconds = seconds
        self.rid = 0
        self.frames = Frames()
        self.frames.ceiling = CEILING['frame']
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False      # the pin says who it is
        context.verify_mode = ssl.CERT_NONE
        host, _, port = address.rpartition(':')
        with self.dying():
            self.sock = socket.create_connection(
                (host.strip('[]'), int(port)), seconds)
            self.sock = context.wrap_socket(self.sock)
        self.certificate = self.sock.getpeercert(True)      # DER
        self.cert_hash = sha256(self.certificate)

    @contextlib.contextmanager
    def dying(self):
        """What goes wrong with the network, in words."""
        import socket
        try:
            yield
        except (TimeoutError, socket.timeout):      # two until Python 3.10
            raise CanaryDead('no answer in %d seconds'
                             % self.seconds) from None
        except OSError as e:
            # ssl.SSLError has no strerror of the system.
            raise CanaryDead(' '.join(str(e.strerror or e).split())) from None
        except Refused as e:
            raise CanaryDead('not a tarsnap server: %s' % e) from None

    def send(self, kind, body):
        """Send a request."""
        self.rid += 1
        with self.dying():
            self.sock.sendall(FRAME.pack(len(body), kind, self.rid) + body)

    def next(self):
        """(type, body) of the next answer; ERRORs are raised."""
        while True:
            with self.dying():
                frame = self.frames.next()
                if frame is None:
                    self.receive()
                    continue
            if frame[0] == ERROR:
                raise CanaryRefused(frame[2])
            if frame[0] not in (RECEIVED, BUSY):
                return frame[0], frame[2]

    def receive(self):
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        data = self.sock.recv(64 * KIB)
        if not data:
            raise CanaryDead('the server hung up')
        self.frames.buf += data

    def call(self, kind, body, wanted):
        """The body of the one answer to a request."""
        self.send(kind, body)
        found, body = self.next()
        if found != wanted:
            raise CanaryDead('answer %d to request %d' % (found, kind))
        return body

    def stream(self, kind, body):
        """[(type, body)] of all answers up to OK."""
        self.send(kind, body)
        answers = []
        while not answers or answers[-1][0] != OK:
            answers.append(self.next())
        return answers[:-1]


class Canary:
    """One visit to a server; `times` are the seconds each step took."""

    def __init__(self, key, address, seconds):
        self.key = key
        self.times = {}
        self.start = time.monotonic()
        self.line = CanaryLine(address, seconds)
        statement = self.line.next()[1]
        self.check_statement(statement)
        for role in key.private:
            answer = self.auth(statement, role)
        self.n, = U64.unpack_from(answer)
        self.head = answer[8:40]
        self.read_only = answer[48] & 1
        self.archives = {}              # id -> (record, lineage, state, time)
        self.now = 0                    # the newest of these times
        self.lap('connect')

    def lap(self, step):
        """The step that ends now."""
        now = time.monotonic()
        self.times[step] = now - self.start - sum(self.times.values())

    def check_statement(self, body):
        """The server is the one of our key, or CanaryDead."""
        try:
            _, public, store, serial, _, signature = struct.unpack(
                '>H32s16sQ32s64s', body)
        except struct.error:
            raise CanaryDead('not a tarsnap server') from None
        signed = (b'tarsnap-server-1\0' + store + U64.pack(serial)
                  + self.line.cert_hash)
        if sha256(public) != self.key.fingerprint or not verify(
                public, signature, signed):
            raise CanaryDead('another server than the canary\'s, or somebody '
                             'between')
        if store != self.key.store:
            raise CanaryDead('another store than the canary\'s')

    def auth(self, statement, role):
        nonce = os.urandom(32)
        signed = (b'tarsnap-auth-1\0' + U16.pack(PROTOCOL)
                  + bytes([TRANSPORT_TLS]) + self.key.store
                  + self.line.cert_hash + U64.pack(self.key.machine)
                  + bytes([role]) + statement[58:90] + nonce)
        return self.line.call(
            AUTH, AUTH_HEAD.pack(PROTOCOL, self.key.machine, role) + nonce
            + self.key.private[role].sign(signed), AUTHOK)

    def list(self):
        """Learn which archives there are."""
        self.archives = {}
        for kind, body in self.line.stream(LIST, U16.pack(0)):
            if kind == ARCHIVES:
                for archive, *row in ARCHIVE_ROW.iter_unpack(body[2:]):
                    self.archives[archive] = row
        self.now = max((row[3] for row in self.archives.values()), default=0)

    def resident(self):
        """The id of the archive that stays."""
        return self.key.name(b'resident')

    def read(self, archive):
        """Read an archive's block; CanaryDead if it is not what we wrote."""
        name, block = self.key.record(archive)
        if self.archives[archive][0] != name:
            raise CanaryDead('an archive is not the one that was stored')
        try:
            answers = self.line.stream(GET, b'\3' + U16.pack(1) + name)
        except CanaryRefused as e:
            raise CanaryDead('a block that was stored cannot be read: %s'
                             % e) from None
        if answers != [(BLOCK, name + block)]:
            raise CanaryDead('a block that was stored is damaged')

    def write(self, archive):
        """Store an archive of one block; durable on return."""
        name, block = self.key.record(archive)
        tid = self.begin(KIND_WRITE)
        self.line.send(PUT, name + RECORD + block)
        row = (name, bytes(16), COMPLETE)
        self.archives[archive] = (*row, self.now)
        self.commit(KIND_WRITE, tid, [(archive, *row)], [], [name], [])

    def delete(self, archives):
        """Delete archives; no part of them is live on return."""
        gone = [(x, self.archives.pop(x)[0]) for x in archives
                if x in self.archives]
        names = sorted(name for _, name in gone)
        tid = self.begin(KIND_DELETE)
        self.line.send(DELETE, U16.pack(len(names)) + b''.join(names))
        self.commit(KIND_DELETE, tid, [], gone, [], names)
        try:
            self.line.stream(GET, b'\3' + U16.pack(1) + names[0])
        except CanaryRefused as e:
            if e.code == E_NOBLOCK and self.line.next()[0] == OK:
                return
            raise
        raise CanaryDead('a block that was deleted is still there')

    def begin(self, kind):
        """The id of a new transaction."""
        tid = os.urandom(16)
        self.line.stream(BEGIN, BEGIN_HEAD.pack(
            kind, tid, bytes(16), self.n, self.head, 0))
        return tid

    def commit(self, kind, tid, linked, unlinked, puts, deletes):
        """Sign and send commit n + 1."""
        body = COMMIT_HEAD.pack(COMMIT_MAGIC, self.key.machine, self.n + 1,
                                self.head, kind, tid)
        body += U16.pack(len(linked)) + b''.join(
            archive + record + lineage + bytes([state])
            for archive, record, lineage, state in linked)
        body += U16.pack(len(unlinked)) + b''.join(
            archive + record for archive, record in unlinked)
        for names in (puts, deletes):
            body += U64.pack(len(names)) + sha256(b''.join(names))
        body += live_digest([(archive, row[0], row[2]) for archive, row
                             in self.archives.items()]) + U16.pack(0)
        body += self.key.private[KIND_ROLE[kind]].sign(
            b'tarsnap-history-1\0' + body)
        answer = self.line.call(COMMIT, body, COMMITTED)
        if answer[:40] != U64.pack(self.n + 1) + sha256(body):
            raise CanaryDead('another commit was acknowledged')
        self.n, self.head = self.n + 1, sha256(body)

    def visit(self, look):
        """Read, write, read and delete; with `look` only read."""
        self.list()
        if self.resident() in self.archives:
            self.read(self.resident())
        elif look:
            raise CanaryDead('nothing is stored to be read; a check without '
                             '--read stores it')
        self.lap('read')
        if look:
            return
        if self.read_only:
            raise CanaryDead('read-only: what is stored can be read, nothing '
                             'can be stored')
        if self.resident() not in self.archives:
            self.insist(self.write, self.resident())
            self.read(self.resident())
        fresh = self.key.name(os.urandom(32))
        self.insist(self.write, fresh)
        self.read(fresh)
        self.lap('write')
        old = [x for x, row in self.archives.items()
               if row[3] < self.now - CANARY_OLD
               and x not in (self.resident(), fresh)]
        self.insist(self.delete, [fresh, *old])
        self.lap('delete')

    def insist(self, step, what):
        """Do a step again for as long as others with this key are faster."""
        for tries in itertools.count(1):
            try:
                return step(what)
            except CanaryRefused as e:
                if tries == CANARY_TRIES or e.code not in (
                        E_CONFLICT, E_RESYNC, E_BUSY, E_EXISTS):
                    raise
            self.refresh(tries)
            if step == self.write and what in self.archives:
                return None             # another one has, the resident

    def refresh(self, tries):
        """Give the transaction up, and learn what others did meanwhile."""
        try:
            self.line.call(ABORT, b'', OK)
        except CanaryRefused:
            pass                        # it had not begun
        # Those who met must not meet again.
        time.sleep(0.02 * tries * (1 + os.urandom(1)[0] / 64))
        status = self.line.call(STAT, b'', STATUS)
        self.n, self.head = U64.unpack_from(status)[0], status[8:40]
        self.list()

    def close(self):
        self.line.sock.close()


def canary_run(key, address, seconds, look=False):
    """The Canary that has been at the server at `address` and found that it
    works; CanaryDead if it does not.
    """
    canary = Canary(key, address, seconds)
    try:
        canary.visit(look)
    finally:
        canary.close()
    return canary


##############################################################################
# Check
#
# What a monitor is told of: the front door, which a canary goes through, and,
# where the server directory is, what nobody notices before it is too late.
# Each part adds faults and figures to a Checked.  Changes nothing but what a
# canary leaves.
##############################################################################

# What monitors call the exit statuses of a check.
CHECK_OK, CHECK_WARNING, CHECK_CRITICAL, CHECK_UNKNOWN = range(4)
CHECK_WORDS = ('OK', 'WARNING', 'CRITICAL', 'UNKNOWN')
CHECK_WORSE = (CHECK_OK, CHECK_WARNING, CHECK_UNKNOWN, CHECK_CRITICAL)

CHECK_EXPIRY = (14 * DAY, 3 * DAY)      # of a certificate, until it ends
CHECK_BILL = (6 * 3600, 30 * 3600)      # after a day could be billed
CHECK_MAIL = (2 * 3600, DAY)            # a mail has waited
CHECK_PAY = (2 * DAY, 5 * DAY)          # providers' events were not read
CHECK_DISK = 10 * 10 ** 9               # bytes free, or a twentieth if less
CHECK_MAILS = 200                       # of those that wait are looked at

# Figures for Prometheus: name -> what it is.
CHECK_FIGURES = {
    'check_status': 'Status of a part: 0 well, 1 warning, 2 critical, '
                    '3 unknown.',
    'check_timestamp_seconds': 'When the check ended.',
    'check_step_seconds': 'How long a step of the canary took.',
    'certificate_expiry_timestamp_seconds': 'When a certificate ends.',
    'disk_free_bytes': 'Bytes that are free for us.',
    'disk_size_bytes': 'Bytes of the file system.',
    'billed_timestamp_seconds': 'End of the last day that was billed.',
    'mail_due': 'Mails that wait.',
    'mail_oldest_timestamp_seconds': 'Since when the first of them does.',
    'spool_bytes': 'Bytes of transactions that are not committed.',
    'cleaned_timestamp_seconds': 'End of the last round of cleaning.',
    'scrubbed_timestamp_seconds': 'End of the last round of scrubbing.',
    'damaged_objects': 'Objects that scrubbing found damaged.',
}


class Checked:
    """What a check has found by now."""

    def __init__(self, now):
        self.now = now
        self.parts = {}         # part -> its status
        self.faults = []        # (status, line)
        self.figures = []       # (name, labels, number)
        self.well = []          # what to say if nothing is wrong
        self.nagios = []        # figures as Nagios reads them

    def fault(self, part, status, text):
        self.parts[part] = max(self.parts.get(part, CHECK_OK), status,
                               key=CHECK_WORSE.index)
        if status:
            self.faults.append((status, text if part == 'door' else
                                '%s: %s' % (part, text)))

    def figure(self, name, number, **labels):
        self.figures.append((name, labels, number))

    def limit(self, part, value, limits, text):
        """A fault if `value` is above the first or the second limit."""
        self.fault(part, sum(value > limit for limit in limits), text)

    @contextlib.contextmanager
    def part(self, part):
        """A part of the check; what it cannot find out is a fault, too."""
        self.parts.setdefault(part, CHECK_OK)
        try:
            yield
        except StoreError as e:
            self.fault(part, CHECK_CRITICAL, str(e))
        except (ServerError, OSError) as e:
            self.fault(part, CHECK_UNKNOWN, str(e))

    def status(self):
        return max([status for status, _ in self.faults],
                   key=CHECK_WORSE.index, default=CHECK_OK)

    def lines(self):
        """One line for each fault, the worst first, or one that all is well;
        the figures of the canary follow the first.
        """
        faults = sorted(self.faults, key=lambda fault: -CHECK_WORSE.index(
            fault[0])) or [(CHECK_OK, '; '.join(self.well))]
        lines = ['tarsnapd %s - %s' % (CHECK_WORDS[status], text)
                 for status, text in faults]
        if self.nagios:
            lines[0] += '|' + ' '.join(self.nagios)
        return lines

    def prometheus(self):
        """The figures as Prometheus reads them from a file."""
        self.figure('check_timestamp_seconds', self.now)
        for part, status in self.parts.items():
            self.figure('check_status', status, part=part)
        lines = []
        for name, what in CHECK_FIGURES.items():
            rows = [(labels, number) for found, labels, number
                    in self.figures if found == name]
            if rows:
                lines += ['# HELP tarsnapd_%s %s' % (name, what),
                          '# TYPE tarsnapd_%s gauge' % name]
            for labels, number in rows:
                # A string of JSON is one of theirs.
                words = ','.join('%s=%s' % (label, json.dumps(
                    value, ensure_ascii=False))
                    for label, value in labels.items())
                lines.append('tarsnapd_%s%s %s' % (
                    name, words and '{%s}' % words, number))
        return '\n'.join(lines) + '\n'


def check_door(found, key, address, limits, look):
    """Send a canary, which may take that many seconds: (to warn, to fail)."""
    try:
        canary = canary_run(key, address, limits[1], look)
    except CanaryDead as e:
        return found.fault('door', CHECK_CRITICAL, '%s: %s' % (address, e))
    seconds = sum(canary.times.values())
    did = 'wrote, read and deleted' if 'write' in canary.times else 'read'
    text = '%s: %s a block in %.3f s' % (address, did, seconds)
    found.limit('door', seconds, limits[:1], text)
    found.well.append(text)
    found.nagios = ['time=%.3fs;%d;%d;0' % (seconds, *limits)]
    for step, number in canary.times.items():
        found.nagios.append('%s=%.3fs' % (step, number))
        found.figure('check_step_seconds', round(number, 3), step=step)
    check_certificate(found, 'certificate', address,
                      certificate_end(canary.line.certificate))


def certificate_end(der):
    """When a certificate ends, in seconds."""
    import datetime
    from cryptography import x509
    found = x509.load_der_x509_certificate(der)
    try:
        end = found.not_valid_after_utc
    except AttributeError:              # before cryptography 42
        end = found.not_valid_after.replace(tzinfo=datetime.timezone.utc)
    return int(end.timestamp())


def check_certificate(found, part, where, end):
    """Judge when the certificate that was seen at `where` ends."""
    left = end - found.now
    found.figure('certificate_expiry_timestamp_seconds', end, where=where)
    text = ('the certificate at %s ends on %s' if left > 0 else
            'the certificate at %s ended on %s') % (where, moment(end))
    found.limit(part, -left, [-limit for limit in CHECK_EXPIRY], text)


def check_web(found, url, seconds):
    """The account pages, as a browser comes to them."""
    import http.client
    import ssl
    import urllib.parse
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ('http', 'https') or not parts.hostname:
        raise ServerError('%s is not a URL' % printable(url))
    kind = (http.client.HTTPSConnection if parts.scheme == 'https' else
            http.client.HTTPConnection)
    try:
        with contextlib.closing(kind(parts.netloc, timeout=seconds)) as line:
            line.request('GET', parts._replace(
                scheme='', netloc='', fragment='').geturl() or '/')
            sock, answer = line.sock, line.getresponse()
            ends = getattr(sock, 'getpeercert', dict)().get('notAfter')
            answer.read(MIB)
    except (OSError, http.client.HTTPException) as e:
        return found.fault('web', CHECK_CRITICAL, '%s: %s' % (
            url, ' '.join(str(e).split()) or type(e).__name__))
    if ends:
        check_certificate(found, 'web', url, int(ssl.cert_time_to_seconds(
            ends)))
    found.fault('web', CHECK_OK if answer.status < 400 else CHECK_CRITICAL,
                '%s: status %d %s' % (url, answer.status, answer.reason))


def check_disk(found, server, floor):
    """What is free where we write; below `floor` bytes it is critical."""
    seen = set()
    for path in [server.path] + [store.root for store in (
            server.store, server.accounts) if isinstance(store, FileStore)]:
        device, space = os.stat(path).st_dev, os.statvfs(path)
        if device in seen:
            continue
        seen.add(device)
        free = space.f_bavail * space.f_frsize
        size = space.f_blocks * space.f_frsize
        found.figure('disk_free_bytes', free, path=path)
        found.figure('disk_size_bytes', size, path=path)
        least = floor or min(CHECK_DISK, size // 20)
        found.limit('disk', -free, (-2 * least, -least),
                    '%s: %d bytes are free, %d should be' % (
                        path, free, 2 * least))
        if space.f_files and space.f_favail < space.f_files // 20:
            found.fault('disk', CHECK_CRITICAL, '%s: %d of %d inodes are free'
                        % (path, space.f_favail, space.f_files))


def check_bill(found, server):
    """Whether the days that are over were billed."""
    if server.prices is None:
        return
    if server.run(start_get()) is None:
        return found.fault('bill', CHECK_WARNING, '"tarsnapd bill" was never '
                           'run')
    server.run(ledger_catch_up())
    places = server.perform(('view', 'places')).values()
    last = min(day for day, _ in places) + 1
    found.figure('billed_timestamp_seconds', last * DAY)
    found.limit('bill', found.now - BILL_LATER - (last + 1) * DAY, CHECK_BILL,
                '%s is not billed' % day_text(last))


def check_mail(found, server):
    """Whether mail goes out."""
    if server.post is None:
        return
    names = server.perform(('list', 'mail/due/'))
    found.figure('mail_due', len(names))
    oldest, why = found.now, ''
    for key in names[:CHECK_MAILS]:
        mail = server.run(summed_get(key))
        if mail and mail['time'] < oldest:
            oldest = mail['time']
            why = server.run(mail_tries(key.rpartition('/')[2]))[1].get(
                'reason', 'no attempt was made')
    if names:
        found.figure('mail_oldest_timestamp_seconds', oldest)
    found.limit('mail', found.now - oldest, CHECK_MAIL,
                '%d wait, one since %s: %s' % (len(names), moment(oldest),
                                               why))


def check_payments(found, server):
    """Whether what webhooks leave out is looked for."""
    if not server.conf.get('pay-keys'):
        return
    found.figure('checkouts_due', len(server.perform(
        ('list', 'checkout/due/'))))
    for provider in server.shop().trials:
        found.fault('payments', CHECK_WARNING, '%s is set up for trials: what '
                    'is paid there is entered, and is no money' % provider)
    for provider in server.shop().providers:
        seen = server.run(versioned_get('checkout/seen/%s/' % provider))
        if seen is None:
            found.fault('payments', CHECK_WARNING, '"tarsnapd pay SRV '
                        'reconcile" never had all events of %s' % provider)
            continue
        found.figure('reconciled_timestamp_seconds', seen[1]['until'],
                     provider=provider)
        found.limit('payments', found.now - seen[1]['until'], CHECK_PAY,
                    'events of %s were read on %s' % (
                        provider, moment(seen[1]['until'])))


def check_backlog(found, server):
    """Whether cleaning and scrubbing keep up, and what scrubbing found."""
    held = sum(os.path.getsize(os.path.join(top, name)) for top, _, names
               in os.walk(server.spools.root) for name in names
               if os.path.exists(os.path.join(top, name)))
    found.figure('spool_bytes', held)
    seconds, _ = clean_conf(server.conf)
    with contextlib.suppress(FileNotFoundError):
        last = int(os.stat(os.path.join(server.path, 'clean.lock')).st_mtime)
        found.figure('cleaned_timestamp_seconds', last)
        if seconds and not server.read_only:
            found.limit('backlog', found.now - last, [2 * seconds + DAY],
                        'nothing was cleaned since %s' % moment(last))
    scrub, (rate, seconds) = scrub_saved(server.path), scrub_conf(server.conf)
    found.figure('damaged_objects', len(scrub.damage))
    if scrub.damage:
        found.fault('store', CHECK_CRITICAL, '%d objects are damaged; '
                    '"tarsnapd scrub" names them' % len(scrub.damage))
    if scrub.finished:
        found.figure('scrubbed_timestamp_seconds', int(scrub.finished))
        if rate:
            found.limit('backlog', found.now - scrub.finished,
                        [3 * seconds + DAY], 'the last round of scrubbing '
                        'ended on %s' % moment(scrub.finished))


def check_directory(found, server, floor):
    """All that can only be seen where the server directory is."""
    with found.part('store'):
        server.perform(('get', 'store-id', 0, None))
    for name, run in (('disk', lambda: check_disk(found, server, floor)),
                      ('bill', lambda: check_bill(found, server)),
                      ('mail', lambda: check_mail(found, server)),
                      ('payments', lambda: check_payments(found, server)),
                      ('backlog', lambda: check_backlog(found, server))):
        with found.part(name):
            run()


##############################################################################
# Commands
#
# The command line: `tarsnapd.py COMMAND SRV ...`.  Results on stdout, one line
# on stderr for whatever is wrong, exit 1.
##############################################################################

USAGE = '''\
usage: tarsnapd.py init SRV [--listen HOST:PORT]
                   [--store DIR | s3://BUCKET/PREFIX]
                   [--accounts DIR | s3://BUCKET/PREFIX] [--s3-endpoint URL]
                   [--s3-region REGION] [--s3-addressing auto|path|virtual]
                   [--s3-profile NAME]
       tarsnapd.py fingerprint | cert | rebuild SRV
       tarsnapd.py stats SRV [--json]
       tarsnapd.py clean SRV [--machine N] [--used PERCENT] [--rate BYTES]
                   [--every HOURS] [--abandon] [--dry-run]
       tarsnapd.py serve SRV [--listen HOST:PORT] [--workers N]
                   [--journal stderr|syslog|FILE]
                   [--journal-level trouble|sessions|requests]
       tarsnapd.py user SRV add | passwd | show | close NAME
       tarsnapd.py user SRV export | reset | invite NAME
       tarsnapd.py user SRV address | confirm NAME NEW
       tarsnapd.py user SRV news NAME on | off
       tarsnapd.py user SRV link LINK
       tarsnapd.py user SRV move-machine MACHINE NAME
       tarsnapd.py user SRV quota NAME BYTES | none
       tarsnapd.py user SRV credit | debit NAME DOLLARS --reason TEXT
                   [--key NAME]
       tarsnapd.py user SRV erase NAME [--reason TEXT] [--yes]
       tarsnapd.py user SRV list
       tarsnapd.py pay SRV add NAME DOLLARS --by PROVIDER --reference NAME
                   [--currency CODE] [--text TEXT]
       tarsnapd.py pay SRV refund NAME PAYMENT [DOLLARS] [--chargeback]
                   [--reference NAME] [--text TEXT]
       tarsnapd.py pay SRV list [NAME] [--json]
       tarsnapd.py pay SRV reconcile | price
       tarsnapd.py machine SRV list | show MACHINE
       tarsnapd.py machine SRV quota MACHINE BYTES | none
       tarsnapd.py machine SRV read-only MACHINE on | off
       tarsnapd.py machine SRV delete-delay MACHINE DAYS
       tarsnapd.py machine SRV freeze | unfreeze MACHINE [ROLES]
       tarsnapd.py machine SRV erase MACHINE --reason TEXT [--yes]
       tarsnapd.py bill SRV [--dry-run] [--late]
       tarsnapd.py bill SRV --check [DAY]
       tarsnapd.py report SRV [--month YYYY-MM] [--account NAME]
                   [--json | --csv]
       tarsnapd.py mail SRV [--list | --dry-run | --text KIND |
                   --announce FILE]
       tarsnapd.py check [SRV] [--server HOST:PORT] [--key FILE] [--read]
                   [--warn SECONDS] [--timeout SECONDS] [--disk BYTES]
                   [--web URL] [--prometheus FILE]
       tarsnapd.py scrub SRV [--part N] [--rate BYTES] [--json]
       tarsnapd.py repair SRV [--dry-run]
       tarsnapd.py session --stdio DIR [--machine N] [--roles rwdn]
       tarsnapd.py index-dump SRV MACHINE
       tarsnapd.py COMMAND --help
       tarsnapd.py --version | --help
'''


def open_server(path):
    """The Server of an existing server directory."""
    if not os.path.isdir(path):
        raise ServerError('%s: no such directory' % path)
    if not is_server(path):
        raise ServerError('%s: not a server directory; "tarsnapd.py init" '
                          'makes one' % path)
    return Server(path, say)


def command_init(args):
    """Make a server directory; its fingerprint on stdout."""
    options, (path,) = take_options(
        args, {'--' + name: True for name in INIT_OPTIONS}, 1)
    listen_check(options.get('--listen', ':0'))
    options = {name[2:]: value for name, value in options.items()}
    if is_server(path):
        init_check(path, options)
    elif '://' not in options.get('store', ''):
        options.setdefault('accounts', 'accounts')
    server_create(path, options)
    if certificate_serial(path) == 0:
        certificate_renew(path)
    print(open_server(path).fingerprint())


def init_check(path, options):
    """ServerError if an existing configuration says otherwise."""
    conf = conf_read(path)
    for name, value in options.items():
        if conf.get(name) != value:
            raise ServerError(
                '%s is a server directory already, and its tarsnapd.conf does '
                'not say %s = %s; edit that file' % (path, name, value))


def listen_check(address):
    port = address.rpartition(':')[2]
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ServerError('listen address %s is not HOST:PORT' % address)


def command_fingerprint(args):
    """What clients pin."""
    _, (path,) = take_options(args, {}, 1)
    print(open_server(path).fingerprint())


def command_cert(args):
    """A new certificate; pins stay good."""
    _, (path,) = take_options(args, {}, 1)
    open_server(path)
    certificate_renew(path)


def command_user(args):
    """Accounts: who may register machines, and what they have paid."""
    options, words = take_texts(
        args, {'--reason': True, '--key': True, '--yes': False}, 2, 4)
    verb = words[1]
    if not options.keys() <= USER_OPTIONS.get(verb, set()):
        raise ServerError('--reason is for credit, debit and erase, --key '
                          'for credit and debit, --yes for erase')
    wanted = USER_VERBS.get(verb, (None, len(words) - 2))[1]
    if len(words) - 2 != wanted:
        raise ServerError('user SRV %s takes %d more, not %d; see tarsnapd '
                          'user --help' % (verb, wanted, len(words) - 2))
    if verb not in USER_VERBS:
        raise ServerError('user SRV add|passwd|show|close|export|reset|'
                          'invite NAME, user SRV address|confirm NAME NEW, '
                          'user SRV news NAME on|off, user SRV link LINK, '
                          'user SRV move-machine MACHINE NAME, user SRV quota '
                          'NAME BYTES|none, user SRV credit|debit NAME '
                          'DOLLARS --reason TEXT, user SRV erase NAME, or '
                          'user SRV list')
    server = open_server(words[0])
    if verb in USER_OPTIONS:
        words.append(options)
    try:
        return USER_VERBS[verb][0](server, *words[2:])
    finally:
        server.close()


def user_add(server, name):
    account_address_check(name)
    server.run(account_create(name, read_password()))


def user_passwd(server, name):
    found = server.run(account_need(name))
    server.run(password_change(server.post, found, read_password()))


def user_address(server, name, new):
    found = server.run(account_need(name))
    server.run(address_change(server.post, found, new))


def user_confirm(server, name, new):
    found = server.run(account_need(name))
    link_was_queued(server.run(link_move(server.post, found, new)))


def user_reset(server, name):
    if not mail_address(server.run(account_need(name))[1]['address']):
        raise ServerError('%s is not a mail address' % printable(name))
    link_was_queued(server.run(link_reset(server.post, name)))


def user_invite(server, name):
    if server.run(account_get(name)):
        raise ServerError('user %s exists already' % printable(name))
    link_was_queued(server.run(link_join(server.post, name)))


def link_was_queued(queued):
    """ServerError if it was not."""
    if not queued:
        raise ServerError('such a link was mailed less than %d minutes ago'
                          % (LINK_EACH // 60))


def user_link(server, link):
    """Follow a link from a mail, or what stands after link= in it."""
    token = link.rpartition('link=')[2]
    what, _ = server.run(link_read(token))
    password = None
    if what['kind'] in ('join', 'reset'):
        password = read_password()
    print(server.run(link_use(server.post, token, password)))


def user_news(server, name, how):
    """Whether an account's owner gets announcements."""
    if how not in ('on', 'off'):
        raise ServerError('news is on or off, not %s' % printable(how))
    found = server.run(account_need(name))
    server.run(account_write(found, news=how == 'on' or None))


def user_export(server, name):
    _, account = server.run(account_need(name))
    print(json.dumps(server.run(account_export(account['id'])), indent=1,
                     ensure_ascii=False))


def user_close(server, name):
    server.run(account_close(name))


def user_move_machine(server, machine, name):
    number = machine_need(server, machine)
    _, account = server.run(account_need(name))
    server.run(owner_set(number, account['id'],
                         server.run(machine_load(number)).name))


def user_list(server):
    for account in server.run(account_list()):
        print(account['address'])


def user_quota(server, name, quota):
    found = server.run(account_need(name))
    server.run(account_write(found, quota=quota_parse(quota)))


def quota_parse(text):
    """Bytes, or None for the word none."""
    return None if text == 'none' else size_parse(text)


def user_show(server, name):
    _, account = server.run(account_need(name))
    print('account %s' % account['id'])
    print('address %s' % account['address'])
    print('created %s' % moment(account['created']))
    if 'quota' in account:
        print('quota %d' % account['quota'])
    if account.get('news'):
        print('news on')
    if server.prices:
        user_money_show(server, account['id'])
    for number, ident in server.run(owner_machines()).items():
        if ident == account['id']:
            print('machine %016x %s' % (
                number, printable(server.run(machine_load(number)).name)))


def user_money_show(server, ident):
    """Balance, standing and days left of an account."""
    server.run(ledger_catch_up(ident))
    balance = server.perform(('view', 'balance', ident))
    left = days_left(balance, server.prices, server.perform(('now',)))
    print('balance %s' % money_text(balance.money))
    print('days-left %s' % ('-' if left is None else left))
    standing = server.run(versioned_get(standing_prefix(ident)))
    if standing:
        print('standing %s since %s' % (standing[1]['state'],
                                        moment(standing[1]['since'])))


def user_credit(server, name, text, options):
    user_enter(server, name, 'credit', money_parse(text), options)


def user_debit(server, name, text, options):
    user_enter(server, name, 'adjustment', -money_parse(text), options)


def user_enter(server, name, kind, amount, options):
    """Enter a credit or an adjustment; whoever had no money may go on."""
    reason, key = options.get('--reason'), options.get('--key')
    if not reason or not amount:
        raise ServerError('%s needs an amount and a --reason' % kind)
    if not reason.isprintable():
        raise ServerError('a reason is of printable characters')
    if key:
        money_name_check(key)
    ident = server.run(account_need(name))[1]['id']
    key = key or os.urandom(8).hex()
    if not server.run(ledger_adjust(ident, key, kind, amount, reason)):
        say('%s was entered before; nothing was changed' % key)
    balance_say(server, ident)
    if server.prices and kind == 'credit':
        server.run(money_receipt(server.post, ident, key, amount, reason))


def balance_say(server, ident):
    """Judge an account that got or lost money, and say what it has."""
    if server.prices:
        server.run(ledger_catch_up(ident))
        balance = server.perform(('view', 'balance', ident))
        server.run(standing_update({ident: balance}, server.prices,
                                   server.amnesty, server.post))
        print('balance %s' % money_text(balance.money))


def user_erase(server, name, options):
    """Erase all machines of an account that may be; see erase_machines()."""
    account = account_closed(server, name)
    why = erase_reason(server, account)
    return erase_machines(
        server, sorted(number for number, ident in server.run(
            owner_machines()).items() if ident == account['id']),
        options.get('--reason', why), options)


def account_closed(server, name):
    """As account_find(), also by the address that a closed one had."""
    found = [account for account in server.run(accounts_newest()).values()
             if account and account['address'].lower() == name.lower()]
    if len(found) > 1:
        raise ServerError('%s is or was the address of several accounts; say '
                          'which by its id: %s' % (printable(name), ' '.join(
                              account['id'] for account in found)))
    return found[0] if found else account_find(server, name)


def erase_reason(server, account):
    """Why the machines of an account may be erased; ServerError if not."""
    if account.get('closed'):
        return 'the account was closed on %s' % day_text(
            account['closed'] // DAY)
    if server.prices:
        ident = account['id']
        server.run(ledger_catch_up(ident))
        before = server.run(versioned_get(standing_prefix(ident)))
        standing = standing_judge(
            before and before[1], server.perform(('view', 'balance', ident)),
            server.prices, server.perform(('now',)), server.amnesty)
        if standing['state'] == 'deletable':
            return 'the balance of the account has been below zero since ' \
                + day_text(standing['since'] // DAY)
    raise ServerError('%s is not closed and has not been below zero for %d '
                      'days; for one machine there is machine SRV erase'
                      % (printable(account['address']), DELETE_DAYS))


def erase_machines(server, numbers, reason, options):
    """Delete for good all that machines stored, and tell the owners; without
    --yes only say what that is.  Status 1 if one failed.

    Whatever this was killed in, the same command completes it.
    """
    if not 0 < len(reason.encode('utf-8', 'replace')) <= ERASE_REASON or \
            not reason.isprintable():
        raise ServerError('a reason has 1 to %d printable bytes'
                          % ERASE_REASON)
    yes, status, owners = '--yes' in options, 0, {}
    if yes and server.read_only:
        raise ServerError('%s: the store is read-only' % server.path)
    for number in numbers:
        try:
            erased = erase_machine(server, number, reason, yes)
            owner = server.run(owner_get(number))
            owners.setdefault(owner, []).append((number, erased))
        except (StoreError, Refused) as e:
            say('machine %016x: %s' % (number, e))
            status = 1
    if not yes:
        print('nothing was deleted; with --yes all of it is, for good'
              if numbers else 'there is no machine')
        return status
    for owner, machines in owners.items():
        account = server.run(account_load(owner)) if owner else None
        if account:
            server.run(erase_mail(server.post, account[1], machines))
    return status


def erase_machine(server, number, reason, yes):
    """Erase one, or say what would be; its Erased, None if it was not."""
    state = server.run(catch_up(number))
    machine = named(server, machine_load(number))
    said = 'machine %016x %s: ' % (
        number, printable(machine.name) if machine else '?')
    if state.erased is None:
        said += '%d archives, %d blocks, %d bytes' % (
            state.archives, state.blocks, state.bytes)
    else:
        said += 'was deleted on %s: %s' % (
            day_text(state.erased.time // DAY), state.erased.reason)
    if yes:
        state, done = server.run(erase(number, reason)), Cleaned()
        server.run(clean(number, Policy(), done))
        said += '; %d bytes of space are free' % done.deleted_bytes
    print(said)
    return state.erased


def erase_mail(post, account, machines):
    """Steps: tell an account's owner what was erased, [(machine number,
    Erased)], once.
    """
    lines, key = [], []
    for number, erased in machines:
        machine = yield from machine_load(number)
        lines.append('    %s (%016x), on %s:\n    %s' % (
            printable(machine.name), number, day_text(erased.time // DAY),
            erased.reason))
        key.append([number, erased.time])
    yield from mail_account(
        post, account, 'erased', '%s/%s' % (account['id'], json.dumps(key)),
        {'machines': '\n'.join(lines)})


USER_VERBS = {                          # what it does, number of words
    'add': (user_add, 1), 'passwd': (user_passwd, 1), 'show': (user_show, 1),
    'close': (user_close, 1), 'address': (user_address, 2),
    'confirm': (user_confirm, 2), 'reset': (user_reset, 1),
    'invite': (user_invite, 1), 'link': (user_link, 1),
    'export': (user_export, 1), 'news': (user_news, 2),
    'move-machine': (user_move_machine, 2), 'quota': (user_quota, 2),
    'credit': (user_credit, 2), 'debit': (user_debit, 2),
    'erase': (user_erase, 1), 'list': (user_list, 0)}
USER_OPTIONS = {'credit': {'--reason', '--key'},
                'debit': {'--reason', '--key'}, 'erase': {'--reason', '--yes'}}


def command_pay(args):
    """Payments: those that an operator enters, by bank, in cash, by cheque;
    and those of providers.
    """
    options, words = take_texts(
        args, {'--by': True, '--reference': True, '--currency': True,
               '--text': True, '--chargeback': False, '--json': False}, 2, 5)
    act, least, most, known = PAY_VERBS.get(words[1], (None, 0, 0, ''))
    if act is None or not least <= len(words) - 2 <= most or not (
            {name[2:] for name in options} <= set(known.split())):
        raise ServerError(
            'pay SRV add NAME DOLLARS --by PROVIDER --reference NAME, '
            'pay SRV refund NAME PAYMENT [DOLLARS], pay SRV list [NAME], '
            'pay SRV reconcile, or pay SRV price; see --help')
    server = open_server(words[0])
    try:
        return act(server, options, *words[2:])
    finally:
        server.close()


def account_find(server, name):
    """The account of that address, or of that id, also if it is closed."""
    found = server.run(account_get(name))
    if found is None and len(name) == 16 and (
            not set(name) - set(SHARDS) and name != DECOY):
        found = server.run(account_load(name))
    return (found or server.run(account_need(name)))[1]


def cents_parse(text):
    """Attodollars from dollars and cents; ServerError if it is not both."""
    amount = money_parse(text, 2) * (ATTO // 100)
    if not amount:
        raise ServerError('an amount is more than nothing')
    return amount


def pay_add(server, options, name, dollars):
    """Enter a payment; whoever had no money may go on."""
    if not {'--by', '--reference'} <= options.keys():
        raise ServerError('a payment needs --by PROVIDER and --reference')
    provider, reference = options['--by'], options['--reference']
    if not provider.isascii() or not provider.isalnum() or (
            provider != provider.lower()):
        raise ServerError('a provider is a word of small letters and digits, '
                          'such as bank, cash or cheque')
    if options.get('--currency', 'USD') != 'USD':
        raise ServerError('accounts are in US dollars; enter what %s came to '
                          'in these' % printable(options['--currency']))
    amount = cents_parse(dollars)
    ident = account_find(server, name)['id']
    for key in server.perform(('list', 'pay/')):
        _, other, entry = key.split('/')
        if entry == '%s-%s' % (provider, reference) and other != ident:
            raise ServerError('%s is a payment of %s already' % (
                entry, account_addresses(server, [other])[other]))
    if not server.run(ledger_pay(ident, provider, reference, amount,
                                 text=printable(options.get('--text', '')),
                                 post=server.post)):
        say('%s-%s was entered before; nothing was changed'
            % (provider, reference))
    balance_say(server, ident)


def pay_refund(server, options, name, payment, dollars=None):
    """Enter that a payment, or a part of it, was given back."""
    kind = 'chargeback' if '--chargeback' in options else 'refund'
    amount = None if dollars is None else cents_parse(dollars)
    provider = PROVIDER_NAMES.get(payment.partition('-')[0])
    if provider and '--reference' not in options:
        raise ServerError('give it back at %s, which tells us; enter it here '
                          'only with --reference, its name there' % provider)
    ident = account_find(server, name)['id']
    new, amount = server.run(ledger_refund(
        ident, payment, kind, amount, options.get('--reference'),
        printable(options.get('--text', ''))))
    if not new:
        say('this %s was entered before; nothing was changed' % kind)
    print('%s %s' % (kind, money_text(amount)))
    balance_say(server, ident)


def pay_list(server, options, name=None):
    """Print what was paid and given back, oldest first."""
    ident = name and account_find(server, name)['id']
    found = sorted(server.run(ledger_payments(ident)).items(),
                   key=lambda entry: (entry[1].time, entry[0]))
    names = account_addresses(server, {money.account for _, money in found})
    rows = [{'time': moment(money.time), 'user': names[money.account],
             'account': money.account, 'kind': money.kind,
             'name': key.split('/')[2], 'amount': money_text(money.amount),
             'of': money.of, 'text': money.text} for key, money in found]
    if '--json' in options:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        print(printable('%(time)s %(user)s %(kind)s %(name)s %(amount)s'
                        % row + (row['of'] and ' of ' + row['of'])
                        + (row['text'] and ' ' + row['text'])))


def pay_reconciled(server, _):
    """Find what webhooks left out; status 2 if something differs."""
    if server.read_only:
        raise ServerError('%s: the store is read-only' % server.path)
    out = Outcome()
    server.run(pay_reconcile(server.shop(), out))
    for line in out.did:
        print(printable(line))
    for line in out.differs:
        say(printable(line))
    return 2 if out.differs else 0


def pay_price(server, _):
    """Have a Price of one dollar at Stripe; the line for the file of keys."""
    if 'stripe' not in server.shop().providers:
        raise ServerError('%s has no [stripe]' % server.conf['pay-keys'])
    print('price = %s' % server.run(stripe_price()))


PAY_VERBS = {                   # what it does, least and most words, options
    'add': (pay_add, 2, 2, 'by reference currency text'),
    'refund': (pay_refund, 2, 3, 'chargeback reference text'),
    'list': (pay_list, 0, 1, 'json'),
    'reconcile': (pay_reconciled, 0, 0, ''), 'price': (pay_price, 0, 0, '')}


def account_addresses(server, idents):
    """{account id: its address, ? if that cannot be read}."""
    found = {ident: named(server, account_load(ident)) for ident in idents}
    return {ident: account[1]['address'] if account else '?'
            for ident, account in found.items()}


def read_password():
    """First line of stdin, without its end; asked for on a terminal."""
    if sys.stdin.isatty():
        import getpass
        import locale
        try:
            password = getpass.getpass('Password: ')
            again = getpass.getpass('Again: ')
        except UnicodeDecodeError:
            raise ServerError('the password has letters that the locale does '
                              'not know; set LC_ALL, or give it on standard '
                              'input') from None
        if again != password:
            raise ServerError('the passwords differ')
        data = password.encode(locale.getpreferredencoding(False))
    else:
        data = sys.stdin.buffer.readline().rstrip(b'\r\n')
    if not data:
        raise ServerError('empty password')
    return data


def command_machine(args):
    """Registered machines, what they may store, how long what they delete is
    kept, and which of their roles are frozen.
    """
    options, words = take_texts(
        args, {'--reason': True, '--yes': False}, 2, 4)
    verb = words[1]
    if options and verb != 'erase':
        raise ServerError('--reason and --yes are for erase')
    if verb not in MACHINE_VERBS or (
            len(words) - 2 not in MACHINE_VERBS[verb][1]):
        raise ServerError('machine SRV list, machine SRV show MACHINE, '
                          'machine SRV quota MACHINE BYTES|none, '
                          'machine SRV read-only MACHINE on|off, '
                          'machine SRV delete-delay MACHINE DAYS, '
                          'machine SRV freeze|unfreeze MACHINE [ROLES], or '
                          'machine SRV erase MACHINE --reason TEXT')
    server = open_server(words[0])
    if verb == 'erase':
        words.append(options)
    try:
        return MACHINE_VERBS[verb][0](server, *words[2:])
    finally:
        server.close()


def machine_owners(server):
    """{machine number: address of the account it belongs to}."""
    owners = server.run(owner_machines())
    addresses = account_addresses(server, set(owners.values()))
    return {number: addresses[ident] for number, ident in owners.items()}


def named(server, steps):
    """What `steps` return; None if an object is damaged, which is said."""
    try:
        return server.run(steps)
    except Damaged as e:
        say(str(e))
        return None


def machine_list(server):
    """Number, address of the account and name of each, a line each."""
    owners = machine_owners(server)
    for number in server.run(machine_numbers()):
        machine = named(server, machine_load(number))
        print('%016x %s %s' % (number, owners.get(number, '-'),
                               printable(machine.name) if machine else '?'))


def machine_show(server, text):
    machine = server.run(machine_load(machine_need(server, text)))
    now = server.perform(('now',))
    print('machine %016x' % machine.number)
    print('name %s' % printable(machine.name))
    print('bytes %d' % server.run(machine_held(machine.number)))
    print('quota %s' % ('none' if machine.quota is None else machine.quota))
    print('read-only %s' % ('on' if machine.read_only else 'off'))
    print('delete-delay %d' % (delete_delay(machine.delays, now) // DAY))
    for (_, days), (when, fewer) in zip(machine.delays, machine.delays[1:]):
        until = when + days * DAY
        if fewer < days and now < until:
            print('delete-delay-shorter-from %s' % time.strftime(
                '%Y-%m-%d %H:%M:%S', time.gmtime(until)))
    print('frozen %s' % (machine.frozen or '-'))
    print('user %s' % machine_owners(server).get(machine.number, '-'))
    erased = server.run(catch_up(machine.number)).erased
    if erased:
        print('erased %s %s' % (moment(erased.time), erased.reason))


def machine_quota(server, text, quota):
    server.run(machine_set(machine_need(server, text),
                           quota=quota_parse(quota)))


def machine_read_only(server, text, how):
    if how not in ('on', 'off'):
        raise ServerError('read-only is on or off, not %s' % how)
    server.run(machine_set(machine_need(server, text),
                           read_only=how == 'on' or None))


def machine_delete_delay(server, text, days):
    server.run(machine_delay(machine_need(server, text), days_parse(days)))
    machine_show(server, text)


def machine_frozen(server, text, roles='rwdn', frozen=True):
    if not roles or not set(roles) <= set('rwdn'):
        raise ServerError('roles are letters of rwdn')
    server.run(machine_freeze(machine_need(server, text), roles, frozen))
    machine_show(server, text)


def machine_unfrozen(server, text, roles='rwdn'):
    machine_frozen(server, text, roles, False)


def machine_erase(server, text, options):
    """Erase one, such as one whose keys are lost."""
    if '--reason' not in options:
        raise ServerError('erase needs a --reason, which whoever has its keys '
                          'is told')
    return erase_machines(server, [machine_need(server, text)],
                          options['--reason'], options)


MACHINE_VERBS = {                       # what it does, numbers of words
    'list': (machine_list, (0,)), 'show': (machine_show, (1,)),
    'quota': (machine_quota, (2,)), 'read-only': (machine_read_only, (2,)),
    'delete-delay': (machine_delete_delay, (2,)),
    'freeze': (machine_frozen, (1, 2)), 'erase': (machine_erase, (1,)),
    'unfreeze': (machine_unfrozen, (1, 2))}


def machine_need(server, text):
    """The number of a registered machine, or ServerError."""
    number = machine_number(text)
    if server.run(machine_load(number)) is None:
        raise ServerError('no machine %s' % text)
    return number


STATS = ('archives', 'blocks', 'bytes', 'segments', 'segment bytes',
         'dropped', 'dropped bytes', 'orphans', 'orphan bytes')


def stats(machine):
    """Steps: figures of a machine as a dict; see STATS and tarsnapd(8)."""
    state = yield from catch_up(machine)
    prefix = 'seg/%016x/' % machine
    known = dict((yield ('index', machine, 'segments_of', prefix)))
    live = yield ('index', machine, 'segments_live')
    commit = yield ('index', machine, 'commit_at', state.n)
    found = dict.fromkeys(STATS, 0)
    found.update({
        'machine': '%016x' % machine, 'archives': state.archives,
        'blocks': state.blocks, 'bytes': state.bytes, 'segments': len(live),
        'segment bytes': sum(row[1] for row in live), 'commits': state.n,
        'last commit': commit[2] if commit else None, 'lost': state.lost})
    for key in (yield ('list', prefix)):
        if known.get(key) != 0:
            what = 'dropped' if key in known else 'orphan'
            found['dropped' if key in known else 'orphans'] += 1
            found[what + ' bytes'] += (yield ('size', key)) or 0
    return found


def command_stats(args):
    """How much there is, how much of the space is of use, and what is known
    to be damaged; status 2 if anything is.
    """
    options, (path,) = take_options(args, {'--json': False}, 1)
    server, scrub = open_server(path), scrub_saved(path)
    machines = [server.run(stats(number))
                for number in server.run(machine_numbers())]
    lost = [found for found in machines if found['lost']]
    total = {name: sum(found[name] for found in machines) for name in STATS}
    space = sum(total[name] for name in (
        'segment bytes', 'dropped bytes', 'orphan bytes'))
    total['machines'] = len(machines)
    total['used'] = round(100 * total['bytes'] / space, 1) if space else 100.0
    times = [found['last commit'] for found in machines
             if found['last commit'] is not None]
    total['last commit'] = max(times, default=None)
    total.update({'damaged': len(scrub.damage), 'lost': len(lost),
                  'scrubbed': scrub.finished or None})
    if '--json' in options:
        print(json.dumps(stats_names(dict(total, machine=[
            stats_names(found) for found in machines]))))
    else:
        print('machines %d' % total['machines'])
        for name in STATS:
            print('%s %d' % (name, total[name]))
        print('used %.1f%%' % total['used'])
        for name in ('last commit', 'scrubbed'):
            print(name, 'never' if total[name] is None else time.strftime(
                '%Y-%m-%d %H:%M:%S', time.localtime(total[name])))
    for found in lost:
        say('machine %s is read-only: %s' % (found['machine'], found['lost']))
    if scrub.damage:
        say('%d objects are damaged; "tarsnapd.py scrub" names them'
            % len(scrub.damage))
    server.close()
    return 2 if lost or scrub.damage else 0


def stats_names(found):
    """Figures under names for JSON."""
    return {name.replace(' ', '_'): value for name, value in found.items()}


def command_rebuild(args):
    """Make every index anew from the log; status 2 if that lacks anything."""
    _, (path,) = take_options(args, {}, 1)
    server = open_server(path)
    entries, status, start = 0, 0, time.monotonic()
    for number in server.run(machine_numbers()):
        try:
            found, lines = rebuild(server, number)
        except StoreError as e:
            found, lines = 0, [str(e)]
        entries += found
        for line in lines:
            say('machine %016x: %s' % (number, line))
            status = 2
    seconds = max(time.monotonic() - start, 1e-6)
    print('%d entries in %.2f seconds, %d a second' % (
        entries, seconds, entries / seconds))
    server.close()
    return status


def rebuild(server, number):
    """Make a machine's index anew: (entries, what is wrong in lines).

    One that lacks what the old one knows is not taken.
    """
    count = []

    def run():
        state = server.run(catch_up(number))
        count.append(server.perform(('index', number, 'entries')))
        return state

    lines, taken, state, was = server.indexes.make(number, run)
    if not taken:
        lines.append('the index stays as it was: it knows of these')
    elif state.k < was.k:
        lines.append('the log ends at entry %d; before, it had %d'
                     % (state.k, was.k))
    return count[0], lines


def command_clean(args):
    """One round of cleaning; figures on stdout."""
    options, (path,) = take_options(args, {
        '--machine': True, '--used': True, '--rate': True, '--every': True,
        '--abandon': False, '--dry-run': False}, 1)
    policy = Policy()
    policy.used = option_number(options, '--used', policy.used, 0, 99)
    policy.rate = size_parse(options['--rate']) if '--rate' in options else 0
    policy.abandon = '--abandon' in options
    policy.dry = '--dry-run' in options
    every = option_number(options, '--every', 0, 0, 10 ** 6) * 3600
    server = open_server(path)
    if server.read_only:
        raise ServerError('%s: the store is read-only' % path)
    lock = CleanLock(path)
    try:
        if every and (not lock.taken or lock.age() < every):
            return 0
        if not lock.taken:
            raise ServerError('%s: another process cleans it' % path)
        numbers = clean_machines(server, options.get('--machine'))
        status = clean_round(server, numbers, policy)
        if not policy.dry:
            lock.done()
        return status
    finally:
        lock.close()
        server.close()


def clean_machines(server, wanted):
    """Numbers of the machines to clean: all, or the one that is wanted."""
    numbers = server.run(machine_numbers())
    if wanted is None:
        return numbers
    if machine_number(wanted) not in numbers:
        raise ServerError('no machine %s' % wanted)
    return [machine_number(wanted)]


def clean_round(server, numbers, policy):
    """Clean machines; the exit status.  One that fails stops no other."""
    done, status, start = Cleaned(), 0, time.monotonic()
    for number in numbers:
        try:
            server.run(clean(number, policy, done))
        except StoreError as e:
            say('machine %016x: %s' % (number, e))
            status = 1
    for name in Cleaned.FIELDS:
        print(name.replace('_', ' '), getattr(done, name))
    print('seconds %.1f' % (time.monotonic() - start))
    return status or int(done.damaged > 0)


def option_number(options, name, default, least, most):
    """The value of an option that is a number."""
    text = options.get(name, str(default))
    if not text.isdigit() or not least <= int(text) <= most:
        raise ServerError('%s must be a number from %d to %d'
                          % (name, least, most))
    return int(text)


def command_scrub(args):
    """Read everything again; status 2 if anything is damaged."""
    options, (path,) = take_options(
        args, {'--part': True, '--rate': True, '--json': False}, 1)
    part = options.get('--part', '1')
    if not part.isdigit() or not int(part):
        raise ServerError('--part is a number from 1 up, not %s' % part)
    rate = options.get('--rate')
    server = open_server(path)
    run = ScrubRun(server, size_parse(rate) if rate else None)
    try:
        share = None
        if int(part) > 1:
            total = len({x.partition('/')[2] for prefix in ('seg/', 'list/')
                         for x in server.run(iter_list(prefix))})
            share = -(-total // int(part))
        over = run.run(share)
    finally:
        run.close()
        server.close()
    scrub = run.scrub
    damage = sorted(scrub.damage.values())
    if '--json' in options:
        print(json.dumps({
            'objects': scrub.objects, 'segments': scrub.segments,
            'bytes': scrub.bytes, 'round': {
                'started': scrub.started, 'over': over,
                'finished': scrub.finished},
            'damaged': [x._asdict() for x in damage]}))
    else:
        for one in damage:
            say(scrub_line(one))
        print('verified %d objects, %d of them segments, %d bytes: %d damaged'
              '; %s' % (scrub.objects, scrub.segments, scrub.bytes,
                        len(damage), 'the round is over' if over
                        else 'the round goes on'))
    return 2 if damage else 0


def iter_list(prefix):
    """Steps: all keys that begin with `prefix`."""
    return (yield ('list', prefix))


def command_repair(args):
    """Put back what of it can be known again; status 2 if anything is left.
    """
    options, (path,) = take_options(args, {'--dry-run': False}, 1)
    dry, status = '--dry-run' in options, 0
    server = open_server(path)
    if server.read_only:
        raise ServerError('%s: the store is read-only' % path)
    run, able = ScrubRun(server), set()     # keys that may be mended
    try:
        damage = run.scrub.damage
        for number in server.run(machine_numbers()):
            mine = sorted(key for key in damage
                          if key.split('/')[1:2] == ['%016x' % number])
            try:
                mended = server.run(repair(number, mine, dry))
                server.indexes.close()          # what it doubted may be there
                lost = server.run(catch_up(number)).lost
                if not dry and server.perform(('index', number, 'lost')):
                    rebuild(server, number)     # or what it lacked
                    lost = server.run(catch_up(number)).lost
            except StoreError as e:
                mended, lost = [], str(e)
            for key in mended:
                print('%s %s' % ('can be mended' if dry else 'mended', key))
            if dry and mended:          # the rest may come of that
                able.update(mine)
            if lost and not dry:
                status = 2
                say('machine %016x is read-only: %s' % (number, lost))
        if not dry:
            server.run(run.scrub.begin())       # looks at it again
        for one in sorted(damage[key] for key in damage if key not in able):
            status = 2
            say(scrub_line(one))
    finally:
        run.close()
        server.close()
    return status


def command_bill(args):
    """Charge the days that are over; status 2 if a check finds a difference.
    """
    options, words = take_options(args, {'--dry-run': False, '--late': False,
                                         '--check': False}, 1, 2)
    if len(words) == 2 and '--check' not in options:
        raise ServerError('a day is for bill --check only')
    server = open_server(words[0])
    try:
        if '--check' in options:
            return bill_check_say(server, words[1:])
        if server.prices is None:
            raise ServerError('%s/tarsnapd.conf has no prices' % server.path)
        if server.read_only and '--dry-run' not in options:
            raise ServerError('%s: the store is read-only' % server.path)
        bill_say(server, '--dry-run' in options, '--late' in options)
        if '--dry-run' not in options:
            server.run(site_put(server.facts()))
            server.run(owned_complete())
        return 0
    finally:
        server.close()


def bill_check_say(server, words):
    """Check a day, the last one that was billed if none is given."""
    if words:
        day = day_parse(words[0])
    else:
        server.run(ledger_catch_up())
        day = min([day for day, _ in server.perform(('view', 'places'))
                   .values()], default=None)
        start = server.run(start_get())
        if day is None or start is None or day < start:
            print('no day was billed yet')
            return 0
    wrong = server.run(bill_check(day))
    for line in wrong:
        say(line)
    print('%s: %s' % (day_text(day), '%d entries differ' % len(wrong)
                      if wrong else 'as in the logs'))
    return 2 if wrong else 0


def bill_say(server, dry, late):
    """Bill, and say what came of it."""
    dry = Foreseen() if dry else None
    for day, machines, stored, up, down, amount in server.run(
            bill(server.prices, dry, late)):
        print('%s: %d machines, %d byte-days stored, %d up, %d down, %s '
              'dollars%s' % (day_text(day), machines, stored, up, down,
                             money_text(amount),
                             ', not charged' if dry else ''))
    balances, mails = server.perform(('view', 'balances')), []
    if dry:
        judged = server.run(standing_judged(
            dry.balances(balances), server.prices, server.amnesty))
        mails = server.run(mails_new(server.run(
            standing_mails(server.post, judged))))
        due = set(server.run(iter_list('mail/due/')))
        mails = [mail for mail in mails if 'mail/due/' + mail_name(
            mail.kind, mail.key) not in due]
        judged = [one for one in judged if one.new]
    else:
        judged = server.run(standing_update(
            balances, server.prices, server.amnesty, server.post))
    accounts = server.run(accounts_load([one.account for one in judged]))
    for one in judged:
        account = accounts.get(one.account)
        print('%s %s %s: balance %s, days left %s' % (
            printable(account['address']) if account else one.account,
            'would be' if dry else 'is', one.step['state'],
            money_text(one.balance.money), one.left))
    for mail in mails:
        print('%s would get the mail %s' % (mail.to, mail.kind))


def command_report(args):
    """What a month was; status 2 if its closing says other than its days."""
    options, (path,) = take_texts(
        args, {'--month': True, '--account': True, '--json': False,
               '--csv': False}, 1)
    if {'--json', '--csv'} <= options.keys():
        raise ServerError('a report is JSON or CSV, not both')
    server = open_server(path)
    try:
        today = server.perform(('now',)) // DAY
        first = month_days(today - 1)[0]
        if '--month' in options:
            first = month_parse(options['--month'])
        if first > today:
            raise ServerError('%s has not begun' % month_text(first))
        how = 'json' if '--json' in options else (
            'csv' if '--csv' in options else 'text')
        if '--account' in options:
            user = account_find(server, options['--account'])
            found = server.run(account_statement(user['id'], first))
            STATEMENTS[how](user, *found[:-1])
        else:
            found = server.run(month_report(first))
            REPORTS[how](*found[:-1])
    finally:
        server.close()
    for line in found[-1]:
        say(line)
    return 2 if found[-1] else 0


def csv_print(rows):
    """Print rows of words as CSV."""
    import csv
    csv.writer(sys.stdout, lineterminator='\n').writerows(rows)


def csv_safe(text):
    """What somebody else chose, so that no spreadsheet takes it for a formula:
    those that begin like one get a quote in front.
    """
    text = printable(text)
    return "'" + text if text.lstrip()[:1] in tuple(
        '=+-@＝＋－＠') else text


def table_print(rows, right):
    """Print rows of words below each other; columns in `right` end there."""
    rows = [[str(word) for word in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(
            word.rjust(width) if i in right else word.ljust(width)
            for i, (word, width) in enumerate(zip(row, widths))).rstrip())


def money_fields(row):
    """A row of a report whose amounts are dollars, all 18 digits."""
    return {name: money_text(value) if name in REPORT_MONEY + REPORT_SUMS
            else value for name, value in row.items()}


def report_csv(head, rows, totals):
    """A line for each account; sums are for the reader to make."""
    csv_print([[name.replace(' ', '_') for name in REPORT_FIELDS]] + [
        [csv_safe(value) if name == 'user' else value
         for name, value in money_fields(row).items()] for row in rows])


def report_json(head, rows, totals):
    """One object: what month it is, sums, and accounts."""
    print(json.dumps(dict(
        stats_names(head), totals=stats_names(money_fields(totals)),
        accounts=[stats_names(money_fields(row)) for row in rows]),
        indent=1, ensure_ascii=False))


def report_text(head, rows, totals):
    """Sums, a word and its value on each line, and a table of accounts."""
    month_say(head)
    for name in ('accounts', 'machines') + REPORT_BYTES:
        print('%s %d' % (name, totals[name]))
    paid = head['charged'] or any(totals[name] for name in REPORT_MONEY)
    for name in REPORT_MONEY + REPORT_SUMS if paid else ():
        print('%s %s %s' % (name, money_short(totals[name]),
                            money_text(totals[name])))
    names = ['machines', *REPORT_BYTES]
    table = [[row[name] for name in names] for row in rows]
    if paid:
        names += ['charged', 'received', 'balance']
        for line, row in zip(table, rows):
            line += map(money_short, (
                sum(row[name] for name in REPORT_CHARGES),
                sum(row[REPORT_ENTRIES[kind]] for kind in PAID),
                row['closing']))
    if table:
        print()
        table_print([names + ['user']] + [
            line + [printable(row['user'])]
            for line, row in zip(table, rows)], range(len(names)))


def month_say(head):
    """Which days a report is about, and where it is from."""
    print('month %s%s' % (head['month'], head['closed'] * ', closed'))
    if not head['days']:
        print('days 0: none that is over was counted yet')
        return
    print('days %d: %s to %s, %s' % (
        head['days'], head['first day'], head['last day'],
        'charged' if head['charged'] else
        'by the logs: nothing was charged, and downloads are not known'))


def statement_text(user, head, opening, lines, closing):
    """A line for each charge and entry, and the balance after it."""
    print('account %s %s' % (user['id'], printable(user['address'])))
    month_say(head)
    rows, balance = [], opening
    for line in lines:
        balance += line.amount
        rows.append([
            day_text(line.day), line.machine or line.name, line.kind,
            '' if line.quantity is None else line.quantity,
            money_text(line.amount), money_text(balance),
            printable(line.text)])
    if head['charged'] or opening or any(line.amount for line in lines):
        rows = [['', '', 'opening balance', '', '', money_text(opening), ''],
                *rows,
                ['', '', 'closing balance', '', '', money_text(closing), '']]
    else:
        rows = [row[:4] for row in rows]
    if rows:
        print()
        table_print(rows, range(3, 6))


def statement_csv(user, head, opening, lines, closing):
    """The list of the original service, with a column more: a day begins with
    the balance at its end, charges are positive.  What was entered is a
    Payment, of its kind, with the amount the balance grew by and its name.
    """
    rows, balance = [('RECTYPE', 'DATE', 'MACHINE', 'TYPE', 'QUANTITY',
                      'AMOUNT', 'BALANCE', 'REFERENCE')], opening
    rows.append(('Balance', day_text(month_parse(head['month']) - 1), '', '',
                 '', '', money_text(opening), ''))
    for day, some in itertools.groupby(lines, lambda line: line.day):
        some = list(some)
        balance += sum(line.amount for line in some)
        rows.append(('Balance', day_text(day), '', '', '', '',
                     money_text(balance), ''))
        for line in some:
            used = line.quantity is not None
            rows.append((
                'Usage' if used else 'Payment', day_text(day), line.machine,
                line.kind, line.quantity if used else '',
                money_text(-line.amount if used else line.amount), '',
                csv_safe(line.name)))
    csv_print(rows)


def statement_json(user, head, opening, lines, closing):
    """One object, amounts in dollars."""
    print(json.dumps(dict(
        {'account': user['id'], 'user': user['address']}, **stats_names(head),
        opening=money_text(opening), closing=money_text(closing),
        lines=[dict(line._asdict(), day=day_text(line.day),
                    amount=money_text(line.amount),
                    price=line.price and money_text(line.price))
               for line in lines]), indent=1, ensure_ascii=False))


REPORTS = {'text': report_text, 'json': report_json, 'csv': report_csv}
STATEMENTS = {'text': statement_text, 'json': statement_json,
              'csv': statement_csv}


def command_mail(args):
    """Send the mail that is due; status 1 if not all went well."""
    options, (path,) = take_options(
        args, {'--list': False, '--dry-run': False, '--text': True,
               '--announce': True}, 1)
    if len(options) > 1:
        raise ServerError('mail takes one option')
    server = open_server(path)
    said = []
    if '--text' in options:
        mail_print_text(server, options['--text'])
    elif '--list' in options:
        for name, mail, done in server.run(mail_list()):
            print(mail_line(server, name, mail, done))
    elif server.post is None:
        raise ServerError('%s: tarsnapd.conf has no mail-from' % path)
    elif '--dry-run' in options:
        for name, mail, done in server.run(mail_list()):
            if not done and server.run(mail_ready(name)) is not None and (
                    server.run(mail_true(mail))):
                message = mail_render(server.post, path, name, mail)
                print(message.as_string())
    elif server.read_only:
        raise ServerError('%s: the store is read-only' % path)
    elif '--announce' in options:
        subject, text = mail_text_read(options['--announce'])
        print('%d mails queued' % server.run(
            news_put(server.post, subject, text.strip('\n'))))
    else:
        mail_run(server, said.append)
    server.close()
    for line in said:
        say(line)
    return int(bool(said))


def mail_print_text(server, kind):
    if kind not in MAIL_TEXTS:
        raise ServerError('no mail %s; there are %s' % (
            printable(kind), ', '.join(sorted(MAIL_TEXTS))))
    print('Subject: %s\n\n%s' % mail_text(server.path, kind), end='')


def mail_line(server, name, mail, done):
    """A mail for --list: when it was queued, to whom, and what became of it.
    """
    if 'failed' in mail:
        state = 'failed %s: %s' % (moment(mail['time']), mail['failed'])
    elif done:
        state = 'sent %s' % moment(mail['time'])
    else:
        tries, last, due = server.run(mail_tries(name))
        state = 'due' if not tries else 'again %s: %s' % (
            moment(due), last.get('reason', 'no answer yet'))
    return '%s %s %s %s' % (moment(mail.get('queued', mail['time'])),
                            mail['kind'], mail['to'], state)


def command_index_dump(args):
    """The index of a machine as text."""
    _, (path, machine) = take_options(args, {}, 2)
    server = open_server(path)
    number = machine_need(server, machine)
    server.run(catch_up(number))
    for line in server.perform(('index', number, 'dump')):
        print(line)
    server.close()


def machine_number(text):
    """A machine number as machine list prints it (16 hex) or in decimal."""
    try:
        return int(text, 16 if len(text) == 16 else 10)
    except ValueError:
        raise ServerError('%s is not a machine number; machine SRV list '
                          'prints them' % text) from None


def command_serve(args):
    """Serve until SIGTERM."""
    options, (path,) = take_options(
        args, {'--listen': True, '--workers': True, '--journal': True,
               '--journal-level': True}, 1)
    server = open_server(path)
    server.journal = journal_of(server, options)
    server.complain = server.journal.trouble
    scrub_conf(server.conf)
    clean_conf(server.conf)
    server.certificate_load()
    said_ready(server)
    context = None
    if not server.conf.get('front-certificate'):
        context = tls_context(path)
    workers = options.get('--workers') or server.conf.get('workers', '1')
    if not workers.isdigit() or not 1 <= int(workers) <= 256:
        raise ServerError('workers must be a number from 1 to 256')
    raise_limit()
    listener = listener_given() or listen(
        options.get('--listen') or server.conf.get('listen')
        or '[::]:%d' % PORT)
    if int(workers) > 1:
        serve_many(server, listener, context, int(workers))
    else:
        serve_one(server, listener, context, Strangers())


def said_ready(server):
    """Make decoys in a store that has accounts from before there were any,
    or that has lost them; and say what the account pages must know.

    Where they cannot be made, to know users by the time it takes is easier,
    and no reason not to serve.
    """
    if server.read_only or server.frozen:
        return
    try:
        server.run(decoys_make())
        server.run(site_put(server.facts()))
    except StoreError as e:
        server.complain(str(e))


def journal_of(server, options=()):
    """The Journal that a server's configuration, or options, ask for."""
    where, level = [
        dict(options).get('--' + name) or server.conf.get(name, default)
        for name, default in (('journal', 'stderr'),
                              ('journal-level', 'sessions'))]
    if where not in ('stderr', 'syslog'):
        where = os.path.join(server.path, where)
    return Journal(where, level)


def raise_limit():
    """As many descriptors as we may have: a connection needs one."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass


def command_session(args):
    """The protocol on stdin and stdout."""
    options, (path,) = take_options(
        args, {'--stdio': False, '--machine': True, '--roles': True}, 1)
    if '--stdio' not in options:
        raise ServerError('session needs --stdio')
    machine, roles = options.get('--machine'), options.get('--roles')
    if machine is not None:
        machine = machine_number(machine)
    if roles is not None and not set(roles) <= set('rwdn'):
        raise ServerError('roles are letters of rwdn')
    local = open_local(path, True, 'stdio', machine, roles)
    if local.server.conf.get('journal', 'stderr') != 'stderr':
        # Standard error is the client's.
        local.server.journal = journal_of(local.server)
        local.server.complain = local.server.journal.trouble
    client = os.environ.get('SSH_CLIENT', '').partition(' ')[0]
    Pipe(local, 0, 1, client or '-').run()


def take_options(args, known, least, most=None):
    """Split arguments into ({option: value}, words); ServerError if wrong.

    `known` says of each option whether it takes a value.
    """
    options, words, args = {}, [], list(args)
    while args:
        arg = args.pop(0)
        name, equals, value = arg.partition('=')
        if not arg.startswith('--') or arg == '--':
            words.append(arg)
        elif name not in known or (equals and not known[name]):
            raise ServerError('unknown option %s' % arg)
        elif not known[name] or equals:
            options[name] = value
        elif args:
            options[name] = args.pop(0)
        else:
            raise ServerError('option %s needs a value' % name)
    if not least <= len(words) <= (most or least):
        raise ServerError('wrong number of arguments; see --help')
    return options, words


def take_texts(args, known, least, most=None):
    """As take_options(), of a command on accounts, machines or money.

    All but the first word, a path, is text, and is kept, mailed and compared
    as UTF-8: it is that, whatever the locale, or ServerError.
    """
    options, words = take_options(args, known, least, most)
    return ({name: text_of(value) for name, value in options.items()},
            words[:1] + [text_of(word) for word in words[1:]])


def text_of(word):
    """What was typed, of which the interpreter made `word`, as UTF-8."""
    raw = os.fsencode(word)
    try:
        return raw.decode('utf-8')
    except UnicodeDecodeError:
        raise ServerError('%s is not UTF-8' % printable(
            raw.decode('utf-8', 'backslashreplace'))) from None


def command_check(args):
    """Whether all is well: one line on stdout for each fault, or one that
    there is none; a monitor's status.
    """
    found = Checked(int(time.time()))
    try:
        file = check(found, args)
        if file:
            write_file(file, found.prometheus().encode(), 0o644)
    except (ServerError, StoreError) as e:
        found.fault('door', CHECK_UNKNOWN, str(e))
    except OSError as e:
        found.fault('door', CHECK_UNKNOWN, '%s: %s' % (e.filename,
                                                       e.strerror))
    try:
        print('\n'.join(found.lines()), flush=True)
    except OSError as e:
        say('Cannot write to standard output: %s' % e.strerror)
        return CHECK_UNKNOWN            # a status without its line
    return found.status()


def check(found, args):
    """Do what the arguments say; where Prometheus wants its figures."""
    options, words = take_options(args, {
        '--server': True, '--key': True, '--read': False, '--warn': True,
        '--timeout': True, '--disk': True, '--web': True,
        '--prometheus': True}, 0, 1)
    limits = [option_number(options, name, default, 1, 3600)
              for name, default in (('--warn', 10), ('--timeout', 60))]
    path = words[0] if words else ''
    key = options.get('--key') or os.path.join(path, 'canary.key')
    if not words and not {'--server', '--key'} <= options.keys():
        raise ServerError('check needs a server directory, or --server and '
                          '--key')
    if '--disk' in options and not words:
        raise ServerError('--disk needs a server directory')
    floor = size_parse(options['--disk']) if '--disk' in options else None
    if words and not is_server(path):
        raise ServerError('%s: not a server directory' % path)
    if words:
        conf_read(path)
        check_here(found, path, floor, '' if '--key' in options else key)
    with found.part('door'):
        address = options.get('--server') or check_address(path)
        listen_check(address)
        check_door(found, canary_load(key), address, limits,
                   '--read' in options)
    if '--web' in options:
        with found.part('web'):
            check_web(found, options['--web'], limits[1])
    return options.get('--prometheus')


def check_here(found, path, floor, key):
    """All that can be seen in a server directory; `key` is the file of the
    canary that is to be made if there is none, or empty.
    """
    try:
        server = open_server(path)
    except (ServerError, StoreError) as e:      # so it would not start
        return found.fault('store', CHECK_CRITICAL, str(e))
    with contextlib.closing(server):
        if key and not os.path.exists(key):
            with found.part('store'):
                canary_make(server, key)
        check_directory(found, server, floor)


def check_address(path):
    """Where a server directory is served, as seen from this host."""
    conf = conf_read(path)
    if conf.get('front-certificate'):
        raise ServerError('%s is behind a front; --server says where that '
                          'listens' % path)
    host, _, port = (conf.get('listen') or ':%d' % PORT).rpartition(':')
    if port == '0':
        # Any that is free: the one of the server that was started last.
        try:
            found = read_file(os.path.join(path, 'address'), 300)
        except FileNotFoundError:
            raise ServerError('%s listens at any port, and was not started '
                              'yet; --server says where' % path) from None
        host, _, port = found.decode('ascii', 'replace').strip().rpartition(
            ':')
    if host.strip('[]') in ('', '::', '0.0.0.0'):
        host = 'localhost'
    return '%s:%s' % (host, port)


COMMANDS = {
    'init': command_init,
    'check': command_check,
    'fingerprint': command_fingerprint,
    'cert': command_cert,
    'user': command_user,
    'machine': command_machine,
    'mail': command_mail,
    'pay': command_pay,
    'serve': command_serve,
    'session': command_session,
    'rebuild': command_rebuild,
    'clean': command_clean,
    'scrub': command_scrub,
    'index-dump': command_index_dump,
    'bill': command_bill,
    'repair': command_repair,
    'report': command_report,
    'stats': command_stats,
}


##############################################################################
# Main
##############################################################################


def streams_fill():
    """Put something where standard streams are closed, or the first file
    opened would get what is meant for one.  Standard error then goes nowhere;
    reading or writing the others fails.
    """
    for fd, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, 'w', closefd=False)
    sys.stderr = sys.stderr or open(2, 'w', closefd=False)


def output_end():
    """Drop what standard output and standard error could not take, or the
    interpreter would complain of it once more, and end with 120.
    """
    for fd, stream in (1, sys.stdout), (2, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def usage(command):
    """The lines of USAGE about a command."""
    import re
    lines = []
    for line in USAGE.replace('usage:', '      ').splitlines():
        named = re.match(r' {7}tarsnapd\.py (\S+(?: \| \S+)*)', line)
        if named:
            told = command in named[1].split(' | ')
        if told:
            lines.append(line + '\n')
    return 'usage:' + ''.join(lines)[6:]


def answer(argv):
    """Do what was typed; the exit status."""
    if argv[:1] == ['--version']:
        print('tarsnapd %s' % VERSION)
    elif argv[:1] in (['--help'], ['-h']):
        print(USAGE, end='')
    elif not argv or argv[0] not in COMMANDS:
        raise ServerError('%s; see --help' % (
            'unknown command %s' % argv[0] if argv else 'no command'))
    elif '--help' in argv or argv[1:2] == ['-h']:
        print(usage(argv[0]), end='')
    else:
        return COMMANDS[argv[0]](argv[1:]) or 0
    return 0


def main(argv=None):
    """Run a command (by default what was typed); the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    streams_fill()
    for stream in (sys.stdout, sys.stderr):
        if stream in (sys.__stdout__, sys.__stderr__):
            # Accounts have names in UTF-8, whatever the locale of a cron.
            stream.reconfigure(encoding='utf-8', errors='surrogateescape')
    try:
        status = answer(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 1
    except (ServerError, StoreError, ProviderError, Refused) as e:
        say(str(e))
    except OSError as e:
        say('%s: %s' % (e.filename or argv[0], e.strerror or e))
    except Exception as e:
        say('%s: %s: %s' % (argv[0], type(e).__name__, e))
    output_end()
    return 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
