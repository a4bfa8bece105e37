#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap: online backups for the truly paranoid; this is the client.

One file and a key file are all a machine needs to back itself up and to be
restored.  Python >= 3.9 and the `cryptography` package; nothing else.

The way of the data, going out:

    walk -> entries -> pages of 512 -> as they were last time? reuse the page
         -> read, cut into chunks   (boundaries from a secret PRF)
         -> name, look up, deflate, pad, seal            (in processes)
         -> blocks, pipelined to the server, which sees sizes and nothing else
         -> one signed commit object: the archive exists, or nothing happened

and coming back: a record names lists, lists name pages, pages name chunks;
each is fetched ahead, opened, and compared with its name before a byte of it
is used.

Map of this file, bottom up; no section uses a name from a later one:

    errors, bytes         what can go wrong, by what the reader can do about it
    wire                  frames, their numbers, their ceilings
    names and sealing     what a block is called and how it is closed
    key files             who may read, write, delete, destroy
    formats               rows, pages, lists, records; the signed history
    chunks                where a stream of bytes is cut
    channel               a session with a server: TLS, ssh, or a directory
    paths                 patterns, and how a path is shown
    selection             list files, -s, dates
    lines                 how an entry is shown; JSON
    progress              how far a run is, and what signals ask of it
    history               what the server says happened, checked
    cache directory       what is stored already, and how often it is used
    transaction           puts, checkpoints, the commit and its conflicts
    walk                  a tree in the order of its names
    workers               deflating and sealing, in processes
    create                files into chunks; pages, their reuse, the archive
    fetch                 blocks in order, many in flight
    extract               files made again, never outside the target
    list                  -t, -r, --list-archives
    diff, verify          what differs; whether all can be read
    merge                 what -c takes from other archives
    retention             which archives rules keep
    modes that write      create, delete, nuke; statistics, usage
    fsck                  the cache directory made anew; what is damaged
    options, main         the command line

Formats and protocol are written down byte by byte in tarsnap-format(5) and
tarsnap-protocol(7); what the whole protects from and what not, in README.md.
"""

import base64
import collections
import errno
import gc
import hashlib
import hmac
import itertools
import operator
import os
import re
import stat
import struct
import sys
import threading
import time
import zlib

VERSION = '1.1.0'

KIB = 1024
MIB = 1024 * KIB

##############################################################################
# Errors and bytes
#
# Errors are classed by what the reader of the message can do.  Parsing goes
# through Reader, so that every length from outside is checked before use.
##############################################################################


class Error(Exception):
    """Something failed; str() is one line fit for a user."""

    status = 1              # what the program exits with


class UserError(Error):
    """The command, the configuration or a key is wrong; exit 1."""


class RemoteError(Error):
    """The network or the server is in the way; trying again may help."""


class CorruptError(Error):
    """Stored data or an answer is not what was stored; never retried."""


class Unclear(CorruptError):
    """A block that cannot be had or judged now; it may be whole."""


class Refused(RemoteError):
    """The server answered with a typed error; `code` is one of E_*."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


class Restart(Exception):
    """The transaction must walk its input again; not an error to a user."""


class Reader:
    """Takes a byte string apart; every shortfall is a CorruptError.

    `what` names the object in messages.  Fields are big-endian.
    """

    __slots__ = ('buf', 'pos', 'what')

    def __init__(self, buf, what):
        self.buf = buf
        self.pos = 0
        self.what = what

    def take(self, length):
        """The next `length` bytes."""
        end = self.pos + length
        if length < 0 or end > len(self.buf):
            raise CorruptError('%s: cut short at byte %d of %d'
                               % (self.what, self.pos, len(self.buf)))
        out = bytes(self.buf[self.pos:end])
        self.pos = end
        return out

    def unpack(self, form):
        """The fields of the compiled struct `form`."""
        end = self.pos + form.size
        if end > len(self.buf):
            raise CorruptError('%s: cut short at byte %d of %d'
                               % (self.what, self.pos, len(self.buf)))
        out = form.unpack_from(self.buf, self.pos)
        self.pos = end
        return out

    def u8(self):
        return self.unpack(U8)[0]

    def u16(self):
        return self.unpack(U16)[0]

    def u32(self):
        return self.unpack(U32)[0]

    def u64(self):
        return self.unpack(U64)[0]

    def rest(self):
        return self.take(len(self.buf) - self.pos)

    def left(self):
        return len(self.buf) - self.pos

    def end(self):
        """Nothing may follow."""
        if self.pos != len(self.buf):
            raise CorruptError('%s: %d bytes too many'
                               % (self.what, len(self.buf) - self.pos))


U8 = struct.Struct('>B')
U16 = struct.Struct('>H')
U32 = struct.Struct('>I')
U64 = struct.Struct('>Q')


def sha256(data):
    return hashlib.sha256(data).digest()


def show(path):
    """A path of any bytes as text for a message or a listing."""
    return os.fsdecode(path)


class Missing(UserError):
    """An archive that does not exist."""

    def __init__(self, name):
        super().__init__('Archive does not exist: %s' % show(name))


def warn(text):
    """One line on stderr in the program's name; never fails."""
    note('%s: %s\n' % (warn.program, one_line(text)))


warn.program = 'tarsnap'            # main() sets what it was started as


CONTROL_CHARACTER = re.compile('[\0-\x1f\x7f-\x9f]')


def one_line(text):
    """`text` with its control characters escaped: names of files that others
    choose neither end a line nor drive a terminal.
    """
    return CONTROL_CHARACTER.sub(lambda found: ''.join(
        '\\%03o' % byte for byte in found.group().encode()), text)


def note(text):
    """`text` on stderr.  Never fails: no backup stops, and no restore, for a
    full disk under its log or for a terminal that is gone.
    """
    try:
        try:
            sys.stderr.write(text)
        except UnicodeEncodeError:
            sys.stderr.write(text.encode('ascii', 'backslashreplace')
                             .decode())
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def stdout_write(text):
    """`text` on standard output, at once; UserError if that is refused."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        raise stdout_error(e) from None


def stdout_error(error):
    return UserError('Cannot write to standard output: %s' % error.strerror)


def plural(count, noun):
    return '%d %s%s' % (count, noun, '' if count == 1 else 's')


def thread_start(target):
    """A thread that runs `target`, for which our end does not wait; Error
    where there can be none.
    """
    thread = threading.Thread(target=target, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise Error('Cannot start a thread: too many processes, or too little '
                    'memory') from None
    return thread


def write_all(fd, data):
    """Write all of `data` to `fd`, whatever a single write takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


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
    sys.stdout = sys.stdout or open(1, 'w', closefd=False)
    sys.stderr = sys.stderr or open(2, 'w', closefd=False)


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


##############################################################################
# Wire
#
# Frames, their types, error codes and ceilings: tarsnap-protocol(7).  The
# server has its own copy of these numbers; a test holds the two equal.
##############################################################################

PROTOCOL = 1

# Client to server.
HELLO, REGISTER1, REGISTER2, AUTH, STAT, CHANGES, LIST, GET, HAS = range(1, 10)
(BEGIN, PUT, WITHDRAW, DELETE, CHECKPOINT, COMMIT, ABORT, NUKE,
 REVIVE, ACCOUNT) = range(10, 20)

# Server to client.
(STATEMENT, OK, ERROR, CHALLENGE, REGISTERED, AUTHOK, STATUS, COMMIT_OBJECT,
 ADDED, REMOVED, ARCHIVES, BLOCK, BITMAP, BEGUN, RECEIVED, COMMITTED,
 BUSY, FIGURES) = range(128, 146)

(E_BAD, E_ROLE, E_CONFLICT, E_EXISTS, E_NOBLOCK, E_FUNDS, E_QUOTA, E_READONLY,
 E_BUSY, E_EXPIRED, E_RESYNC, E_LOGIN, E_NOMACHINE, E_MISMATCH, E_NOARCHIVE,
 E_INTERNAL) = range(1, 17)

ROLE_READ, ROLE_WRITE, ROLE_DELETE, ROLE_NUKE = 1, 2, 3, 4
ROLE_NAME = {1: 'read', 2: 'write', 3: 'delete', 4: 'nuke'}

KIND_WRITE, KIND_DELETE, KIND_NUKE, KIND_ABORT, KIND_UNDELETE = 1, 2, 3, 4, 5
KIND_ROLE = {1: ROLE_WRITE, 2: ROLE_DELETE, 3: ROLE_NUKE, 4: ROLE_WRITE,
             5: ROLE_DELETE}

OPEN, PARTIAL, COMPLETE = 1, 2, 3

TRANSPORT_TLS, TRANSPORT_STDIO, TRANSPORT_DIR = 1, 2, 3

# What of a block GET asks for: only whether it is whole, its refs, all.
GET_LOOK, GET_REFS, GET_WHOLE = b'\0', b'\1', b'\3'

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


##############################################################################
# Names and sealing
#
# A block is named by a keyed hash of what is in it and sealed so that only the
# holder of its recipient's private key opens it.  Every block read is compared
# with its name: that is the integrity of the system, and the key commitment
# that GCM lacks.  Knows nothing of files or servers.
##############################################################################

CHUNK, INDEX, RECORD = b'c', b'i', b'a'
PARTS = {CHUNK: 1, INDEX: 2, RECORD: 3}
TO_DATA, TO_REFS = 1, 2
RECIPIENTS = {CHUNK: (TO_DATA,), INDEX: (TO_REFS, TO_DATA),
              RECORD: (TO_REFS, TO_REFS, TO_DATA)}

SUITE = 1                   # X25519, HKDF-SHA256, HMAC-SHA256, AES-256-GCM
STORED, DEFLATE = 0, 1      # codecs

BLOCK_HEAD = struct.Struct('>BcB32s')
PART_HEAD = struct.Struct('>BI')
PLAIN_HEAD = struct.Struct('>BII')      # codec, length, packed length
NONCE, TAG = 12, 16

# How many peers' ephemeral keys a reader remembers the shared secret of; there
# is one to a transaction and process, and an X25519 costs 40 us.
SECRETS = 256


def padme(length):
    """The PADME length for `length`: only its leading log2(log2) bits stay.

    Never more than 12 % longer, 6 % from 4 KiB and 3 % from 64 KiB up.
    Nikitin et al., "Reducing Metadata Leakage from Encrypted Files and
    Communication with PURBs", 2019.
    """
    if length < 2:
        return length
    exponent = length.bit_length() - 1
    drop = exponent - exponent.bit_length()
    mask = (1 << drop) - 1
    return (length + mask) & ~mask


def deflate(data, level):
    """Raw deflate (RFC 1951): no header or checksum, the name is stronger."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


# More different values in 615 bytes are noise: it has 233 on average, and more
# than this in 9 of 10 samples.
NOISE = 228


def shrinks(data):
    """True if pieces from the start, the middle and the end of `data` do.

    Where nearly all values are among them nothing is deflated, which takes a
    quarter of the time.
    """
    middle = len(data) // 2
    pieces = b'%b%b%b' % (data[:KIB], data[middle:middle + KIB], data[-KIB:])
    if len(set(pieces[::5])) > NOISE:     # 5: across numbers of any width
        return False
    # A window of 4 KiB holds them, and takes half of the time.
    packer = zlib.compressobj(1, zlib.DEFLATED, -12, 5)
    return len(packer.compress(pieces) + packer.flush()) < len(pieces)


def frame_plain(data, level, pad):
    """`data` with codec, lengths and zeros, ready to be encrypted.

    Padded so that nonce, ciphertext and tag together have a PADME length.
    Level 0 stores; so does what does not shrink.
    """
    codec, packed = STORED, data
    if level:
        packed = deflate(data, level)
        codec = DEFLATE
        if len(packed) >= len(data):
            codec, packed = STORED, data
    head = PLAIN_HEAD.pack(codec, len(data), len(packed))
    length = NONCE + TAG + len(head) + len(packed)
    zeros = padme(length) - length if pad else 0
    return b'%b%b%b' % (head, packed, bytes(zeros))


def unframe_plain(plain, ceiling, what):
    """Undo frame_plain, in the order that leaves nothing to an attacker.

    Both lengths are compared with `ceiling`, the padding is zeros, and the
    inflater is bounded and must end exactly at `length`.
    """
    if len(plain) < PLAIN_HEAD.size:
        raise CorruptError('%s: no room for its own header' % what)
    codec, length, packed = PLAIN_HEAD.unpack_from(plain)
    end = PLAIN_HEAD.size + packed
    if length > ceiling or packed > ceiling or end > len(plain):
        raise CorruptError('%s: length over its ceiling' % what)
    if plain.count(0, end) != len(plain) - end:
        raise CorruptError('%s: padding is not zeros' % what)
    data = plain[PLAIN_HEAD.size:end]
    if codec == STORED:
        if length != packed:
            raise CorruptError('%s: two lengths for one stored part' % what)
        return data
    if codec != DEFLATE:
        raise CorruptError('%s: unknown codec %d' % (what, codec))
    inflater = zlib.decompressobj(-15)
    try:
        data = inflater.decompress(data, length + 1)
    except zlib.error as e:
        raise CorruptError('%s: %s' % (what, e)) from None
    if len(data) != length or not inflater.eof or inflater.unused_data:
        raise CorruptError('%s: does not inflate to its length' % what)
    return data


def shared_secret(secret, pk, epk, mix, recipient):
    """S of DESIGN: HKDF-SHA256 (RFC 5869) of the exchange and the mix secret.

    The mix secret, which no server ever holds, keeps recorded blocks closed
    to whoever can one day undo X25519 but has no key file.
    """
    info = b'tarsnap-seal-1' + bytes([SUITE, recipient]) + pk
    prk = hmac.digest(epk, secret + mix, 'sha256')
    return hmac.digest(prk, info + b'\x01', 'sha256')


def block_key(secret, cls, part, name):
    """A key of its own for each block and part, from its content's name."""
    return hmac.digest(secret, cls + bytes([part]) + name, 'sha256')


def block_aad(cls, part, name, machine):
    return bytes([SUITE]) + cls + bytes([part]) + name + U64.pack(machine)


class Sealer:
    """Closes blocks to a key file's recipients.

    One ephemeral key for each process and transaction, never on disk.  The
    key of a part depends on its name, so a cloned or forked process can only
    repeat a key for equal content, and its nonces are random besides.
    """

    __slots__ = ('key', 'fresh', 'pad', 'level')

    def __init__(self, key, level=2, pad=True):
        self.key = key                  # Key
        self.pad = pad                  # zeros up to a PADME length
        self.level = level              # deflate level
        self.fresh = None               # (process, epk, recipient -> S)

    def ephemeral(self):
        """(epk, recipient -> S): made at the start and in a forked child."""
        fresh = self.fresh
        if fresh and fresh[0] == os.getpid():
            return fresh[1:]
        from cryptography.hazmat.primitives.asymmetric import x25519
        esk = x25519.X25519PrivateKey.generate()
        epk = raw_public(esk)
        secrets = {}
        for recipient, pk, mix in ((TO_DATA, self.key.data_pub,
                                    self.key.mix_data),
                                   (TO_REFS, self.key.refs_pub,
                                    self.key.mix_refs)):
            peer = x25519.X25519PublicKey.from_public_bytes(pk)
            secrets[recipient] = shared_secret(esk.exchange(peer), pk,
                                               epk, mix, recipient)
        self.fresh = (os.getpid(), epk, secrets)
        return epk, secrets

    def seal(self, cls, name, parts, level=None):
        """The sealed block for plain `parts` (bytes each) named `name`."""
        level = self.level if level is None else level
        return self.encrypt(cls, name, [frame_plain(data, level, self.pad)
                                        for data in parts])

    def encrypt(self, cls, name, framed):
        """The sealed block for parts that are framed already."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        epk, secrets = self.ephemeral()
        out = [BLOCK_HEAD.pack(SUITE, cls, len(framed), epk)]
        for number, plain in enumerate(framed):
            recipient = RECIPIENTS[cls][number]
            nonce = os.urandom(NONCE)
            key = block_key(secrets[recipient], cls, number, name)
            text = AESGCM(key).encrypt(
                nonce, plain, block_aad(cls, number, name, self.key.machine))
            out += (PART_HEAD.pack(recipient, NONCE + len(text)), nonce, text)
        return b''.join(out)

    def check(self, cls, name, parts, block):
        """Open a block just sealed and compare; RuntimeError if it differs.

        A write key can: it still holds the ephemeral half.
        """
        _, secrets = self.ephemeral()
        if block_open(cls, name, block, self.key.machine,
                      lambda epk, recipient, what: secrets[recipient]) \
                != list(parts):
            raise RuntimeError('block %s does not open to what was sealed'
                               % name.hex()[:16])


class Opener:
    """Opens sealed blocks with the private halves a key file holds."""

    __slots__ = ('key', 'secrets', 'privates', 'lock')

    def __init__(self, key):
        from cryptography.hazmat.primitives.asymmetric import x25519
        self.key = key
        self.secrets = collections.OrderedDict()    # (epk, recipient) -> S
        self.lock = threading.Lock()                # guards secrets
        self.privates = {}
        for recipient, raw in ((TO_DATA, key.data_priv),
                               (TO_REFS, key.refs_priv)):
            if raw:
                self.privates[recipient] = \
                    x25519.X25519PrivateKey.from_private_bytes(raw)

    def secret(self, epk, recipient, what):
        """The shared secret for one ephemeral key, remembered."""
        from cryptography.hazmat.primitives.asymmetric import x25519
        with self.lock:
            found = self.secrets.get((epk, recipient))
        if found:
            return found
        private = self.privates.get(recipient)
        if private is None:
            raise UserError('%s: this key cannot read that part' % what)
        pk, mix = ((self.key.data_pub, self.key.mix_data)
                   if recipient == TO_DATA else
                   (self.key.refs_pub, self.key.mix_refs))
        try:
            peer = x25519.X25519PublicKey.from_public_bytes(epk)
            found = shared_secret(private.exchange(peer), pk, epk, mix,
                                  recipient)
        except ValueError:
            raise CorruptError('%s: bad ephemeral key' % what) from None
        with self.lock:
            self.secrets[epk, recipient] = found
            while len(self.secrets) > SECRETS:
                self.secrets.popitem(last=False)
        return found

    def open(self, cls, name, block, refs_only=False):
        """The plain parts of a sealed block, by GCM, lengths and padding.

        `refs_only` takes the leading parts sealed to `refs` (a pruning key
        can open no others).  The caller compares the name.
        """
        return block_open(cls, name, block, self.key.machine, self.secret,
                          refs_only)


def block_open(cls, name, block, machine, secret, refs_only=False):
    """The plain parts of a sealed block; CorruptError if it is not whole.

    `secret(epk, recipient, what)` gives the shared secret.
    """
    what = 'block %s' % name.hex()[:16]
    return [unframe_plain(plain, CEILING['part'], what) for plain in
            block_decrypt(cls, name, block, machine, secret, refs_only)]


def chunk_open(opener, names, kid, body):
    """The content of chunk `kid` in a BLOCK's `body`: its name, then what is
    sealed.  CorruptError if it is damaged, or not what its name says.
    """
    data, = opener.open(CHUNK, kid.name, block_named(kid, body))
    if len(data) != kid.plain:
        raise CorruptError('block %s: has %d bytes, not the %d expected'
                           % (kid.name.hex()[:16], len(data), kid.plain))
    name_check(kid, names.chunk(data))
    return data


def block_named(kid, body):
    """The sealed block in a BLOCK's `body`, if it has the name of `kid`."""
    if body[:32] != kid.name:
        raise CorruptError('block %s: the server sent another block in its '
                           'place' % kid.name.hex()[:16])
    return body[32:]


def name_check(kid, found):
    """CorruptError unless `found`, of its content, is the name of `kid`."""
    if not hmac.compare_digest(found, kid.name):
        raise CorruptError('block %s: its content is not what its name says'
                           % kid.name.hex()[:16])


def block_decrypt(cls, name, block, machine, secret, refs_only=False):
    """The parts of a sealed block as they were framed."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    what = 'block %s' % name.hex()[:16]
    if len(block) > CEILING['stored chunk' if cls == CHUNK
                            else 'stored index']:
        raise CorruptError('%s: longer than any block' % what)
    reader = Reader(block, what)
    suite, found, parts, epk = reader.unpack(BLOCK_HEAD)
    if suite != SUITE or found != cls or parts != PARTS[cls]:
        raise CorruptError('%s: not a block of class %s'
                           % (what, cls.decode()))
    out = []
    for number, recipient in enumerate(RECIPIENTS[cls]):
        if refs_only and recipient != TO_REFS:
            return out
        to, length = reader.unpack(PART_HEAD)
        if to != recipient or length < NONCE + TAG:
            raise CorruptError('%s: bad part header' % what)
        nonce, text = reader.take(NONCE), reader.take(length - NONCE)
        key = block_key(secret(epk, recipient, what), cls, number, name)
        try:
            out.append(AESGCM(key).decrypt(nonce, text, block_aad(
                cls, number, name, machine)))
        except InvalidTag:
            raise CorruptError('%s: not what was stored under this name (its '
                               'seal is broken)' % what) from None
    reader.end()
    return out


def raw_public(private):
    """The 32 raw bytes of the public half of an X25519 or Ed25519 key.

    From cryptography 40 on without what reads and writes all formats of keys:
    to import that takes a third of the time of a short command.
    """
    public = private.public_key()
    if hasattr(public, 'public_bytes_raw'):
        return public.public_bytes_raw()
    from cryptography.hazmat.primitives import serialization as ser
    return public.public_bytes(ser.Encoding.Raw, ser.PublicFormat.Raw)


def sign(private, message):
    """Ed25519 (RFC 8032) signature by the raw 32-byte `private`."""
    from cryptography.hazmat.primitives.asymmetric import ed25519
    key = ed25519.Ed25519PrivateKey.from_private_bytes(private)
    return key.sign(message)


def verify(public, signature, message):
    """True if `signature` over `message` is by the raw 32-byte `public`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ed25519
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class Names:
    """The keyed names of one key file: HMAC-SHA256, never cut short."""

    __slots__ = ('macs',)

    def __init__(self, key):
        # Purpose -> an HMAC that has its key and the purpose in it.
        self.macs = {}
        for secret, purposes in ((key.k_data, 'crd'), (key.k_refs, 'pans')):
            for purpose in map(str.encode, purposes if secret else ''):
                self.macs[purpose] = hmac.new(secret, purpose, 'sha256')

    def name(self, purpose, data):
        mac = self.macs[purpose].copy()
        mac.update(data)
        return mac.digest()

    def chunk(self, data):
        return self.name(b'c', data)

    def rows(self, data):
        return self.name(b'r', data)

    def content(self, data):
        """16 bytes that tell equal small files."""
        return self.name(b'd', data)[:16]

    def index(self, refs):
        return self.name(b'p', refs)

    def record(self, refs):
        return self.name(b'a', refs)

    def archive(self, name):
        """Archive id of the archive called `name` (bytes)."""
        return self.name(b'n', name)

    def series(self, series):
        return self.name(b's', series)[:16]


##############################################################################
# Key files
#
# A key file is text around base64; inside, either our own content (magic,
# version, SHA-256 of the rest, fields) or that content in the format of the
# scrypt(1) utility, which opens it too.  Which fields are there is what the
# holder may do.  Makes and reads key files; knows no server.
##############################################################################

KEY_START = b'# START OF TARSNAP KEY FILE'
KEY_END = b'# END OF TARSNAP KEY FILE'
KEY_MAGIC = b'tarsnap-key\x00'
KEY_VERSION = 1
KEY_LONGEST = MIB

# Field tags.  Those below 16 are in every key file.
(F_MACHINE, F_STORE, F_SERVER, F_PINS, F_NAME, F_SIGN_PUBS, F_DATA_PUB,
 F_REFS_PUB, F_PARENT) = range(1, 10)
(F_DATA_PRIV, F_REFS_PRIV, F_MIX_DATA, F_MIX_REFS, F_K_DATA, F_K_REFS, F_K_CUT,
 F_SIGN_R, F_SIGN_W, F_SIGN_D, F_SIGN_N) = range(16, 27)

KEY_FIELDS = {
    F_DATA_PUB: 'data_pub', F_REFS_PUB: 'refs_pub', F_PARENT: 'parent',
    F_DATA_PRIV: 'data_priv', F_REFS_PRIV: 'refs_priv',
    F_MIX_DATA: 'mix_data', F_MIX_REFS: 'mix_refs', F_K_DATA: 'k_data',
    F_K_REFS: 'k_refs', F_K_CUT: 'k_cut',
}

# The secrets each role is made of, besides its own signing key.
ROLE_SECRETS = {
    ROLE_READ: ('data_priv', 'refs_priv', 'mix_data', 'mix_refs', 'k_data',
                'k_refs'),
    ROLE_WRITE: ('mix_data', 'mix_refs', 'k_data', 'k_refs', 'k_cut'),
    ROLE_DELETE: ('refs_priv', 'mix_refs', 'k_refs'),
    ROLE_NUKE: (),
}
SECRETS_ALL = ('data_priv', 'refs_priv', 'mix_data', 'mix_refs', 'k_data',
               'k_refs', 'k_cut')

FIELD_HEAD = struct.Struct('>BH')


class Key:
    """The contents of a key file.  Secrets not held are empty bytes."""

    __slots__ = ('machine', 'store', 'server', 'pins', 'name', 'sign_pubs',
                 'data_pub', 'refs_pub', 'parent', 'sign_privs', 'path',
                 *SECRETS_ALL)

    def __init__(self):
        self.machine = 0        # number the server gave, u64
        self.store = b''        # id of the server's store, 16 bytes
        self.server = ''        # HOST:PORT, a directory, or ssh://HOST/DIR
        self.pins = []          # SHA-256 of server identities, 1 to 8
        self.name = ''          # the machine's name, for people
        self.sign_pubs = {}     # role -> Ed25519 public, 32 bytes
        self.sign_privs = {}    # role -> Ed25519 private, those held
        self.data_pub = b''     # X25519: chunks, rows, argv
        self.refs_pub = b''     # X25519: references, archive names
        self.parent = b''       # public_hash of the key this was regen'ed from
        self.path = ''          # file it came from, for messages
        for field in SECRETS_ALL:
            setattr(self, field, b'')

    def can(self, role):
        """True if this key holds everything `role` (ROLE_*) needs."""
        return role in self.sign_privs and all(
            getattr(self, field) for field in ROLE_SECRETS[role])

    def need(self, role, mode):
        """UserError unless this key has `role`."""
        if not self.can(role):
            raise UserError('The %s authorization is not in key file %s; '
                            '%s needs it' % (ROLE_NAME[role], self.path, mode))

    def public_hash(self):
        """SHA-256 over all public halves: what two machines compare."""
        return sha256(b''.join(self.sign_pubs[role] for role in (1, 2, 3, 4))
                      + self.data_pub + self.refs_pub)

    def genesis(self):
        """H_0: where this machine's history begins."""
        return sha256(b'tarsnap-genesis-1' + U64.pack(self.machine)
                      + self.store + b''.join(self.sign_pubs[role]
                                              for role in (1, 2, 3, 4)))

    def subset(self, roles):
        """A copy that holds only what `roles` (a set of ROLE_*) need."""
        out = Key()
        for field in ('machine', 'store', 'server', 'name', 'data_pub',
                      'refs_pub', 'parent', 'path'):
            setattr(out, field, getattr(self, field))
        out.pins = list(self.pins)
        out.sign_pubs = dict(self.sign_pubs)
        for role in roles:
            out.sign_privs[role] = self.sign_privs[role]
            for field in ROLE_SECRETS[role]:
                setattr(out, field, getattr(self, field))
        return out


def key_make(server, name):
    """A new full key: every secret independent and random.

    Machine number, store id and pins are for the caller to fill in when the
    server has answered.
    """
    from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
    key = Key()
    key.server, key.name = server, name
    for role in (ROLE_READ, ROLE_WRITE, ROLE_DELETE, ROLE_NUKE):
        private = ed25519.Ed25519PrivateKey.generate()
        key.sign_privs[role] = raw_private(private)
        key.sign_pubs[role] = raw_public(private)
    for field in ('data', 'refs'):
        private = x25519.X25519PrivateKey.generate()
        setattr(key, field + '_priv', raw_private(private))
        setattr(key, field + '_pub', raw_public(private))
    for field in ('mix_data', 'mix_refs', 'k_data', 'k_refs', 'k_cut'):
        setattr(key, field, os.urandom(32))
    return key


def raw_private(private):
    if hasattr(private, 'private_bytes_raw'):       # see raw_public()
        return private.private_bytes_raw()
    from cryptography.hazmat.primitives import serialization as ser
    return private.private_bytes(ser.Encoding.Raw, ser.PrivateFormat.Raw,
                                 ser.NoEncryption())


def key_encode(key):
    """The content of a key file, before any passphrase."""
    fields = [(F_MACHINE, U64.pack(key.machine)), (F_STORE, key.store),
              (F_SERVER, os.fsencode(key.server)),
              (F_PINS, b''.join(key.pins)), (F_NAME, os.fsencode(key.name)),
              (F_SIGN_PUBS, b''.join(key.sign_pubs[role]
                                     for role in (1, 2, 3, 4)))]
    fields += [(tag, getattr(key, name)) for tag, name in KEY_FIELDS.items()
               if getattr(key, name)]
    fields += [(F_SIGN_R + role - 1, private)
               for role, private in sorted(key.sign_privs.items())]
    body = b''.join(FIELD_HEAD.pack(tag, len(data)) + data
                    for tag, data in fields)
    return KEY_MAGIC + bytes([KEY_VERSION]) + sha256(body) + body


def key_decode(content, path):
    """The Key in `content`; UserError naming `path` for anything else."""
    if not content.startswith(KEY_MAGIC):
        raise UserError('%s: not a key file of this program (keys of the '
                        'original Tarsnap work only with its own service)'
                        % path)
    reader = Reader(content, path)
    try:
        reader.take(len(KEY_MAGIC))
        if reader.u8() != KEY_VERSION:
            raise UserError('%s: key file of a newer version' % path)
        digest, body = reader.take(32), reader.rest()
        if sha256(body) != digest:
            raise UserError('%s: key file is damaged (checksum differs)'
                            % path)
        key = Key()
        key.path = path
        reader = Reader(body, path)
        while reader.left():
            tag, length = reader.unpack(FIELD_HEAD)
            key_field(key, tag, reader.take(length))
    except CorruptError as e:
        raise UserError('key file is damaged: %s' % e) from None
    if len(key.sign_pubs) != 4 or len(key.store) != 16 or not key.machine \
            or not key.data_pub or not key.refs_pub:
        raise UserError('%s: key file is damaged (fields are missing)' % path)
    return key


def key_field(key, tag, data):
    """Set one decoded field; tags not known are left for newer versions."""
    signing = F_SIGN_R <= tag <= F_SIGN_N
    if (tag in KEY_FIELDS or signing) and len(data) != 32 \
            or tag == F_SIGN_PUBS and len(data) != 128 \
            or tag == F_PINS and len(data) % 32:
        raise CorruptError('field %d has a wrong length' % tag)
    if tag == F_MACHINE:
        key.machine = Reader(data, 'machine number').u64()
    elif tag == F_STORE:
        key.store = data
    elif tag == F_SERVER:
        key.server = os.fsdecode(data)
    elif tag == F_NAME:
        key.name = os.fsdecode(data)
    elif tag == F_PINS:
        key.pins = [data[i:i + 32] for i in range(0, len(data), 32)]
    elif tag == F_SIGN_PUBS:
        key.sign_pubs = {role: data[32 * role - 32:32 * role]
                         for role in (1, 2, 3, 4)}
    elif signing:
        key.sign_privs[tag - F_SIGN_R + 1] = data
    elif tag in KEY_FIELDS:
        setattr(key, KEY_FIELDS[tag], data)


def key_text(content):
    """`content` (plain or scrypt'ed) as the text of a key file."""
    text = base64.b64encode(content)
    lines = [text[i:i + 64] for i in range(0, len(text), 64)]
    return b'\n'.join([KEY_START] + lines + [KEY_END, b''])


def key_untext(text, path):
    """The content in the text of a key file."""
    lines = text.replace(b'\r', b'').split(b'\n')
    if KEY_START not in lines or KEY_END not in lines:
        raise UserError('%s: not a key file (its first and last lines are '
                        'missing)' % path)
    try:
        return base64.b64decode(b''.join(
            lines[lines.index(KEY_START) + 1:lines.index(KEY_END)]),
            validate=True)
    except ValueError:
        raise UserError('%s: key file is damaged (not base64)'
                        % path) from None


def key_create(path):
    """A descriptor on a new key file: 0600 under any umask, never over one."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as e:
        raise UserError('Cannot create key file %s: %s'
                        % (path, e.strerror)) from None
    os.fchmod(fd, 0o600)
    return fd


def key_write(fd, key, passphrase=None, memory=None, seconds=1.0):
    """Write `key` to the new descriptor `fd`; durable on return.

    `passphrase` (bytes) encrypts it, with a cost of about `seconds` and at
    most `memory` bytes.
    """
    content = key_encode(key)
    if passphrase is not None:
        content = scrypt_encrypt(content, passphrase, memory, seconds)
    write_all(fd, key_text(content))
    os.fsync(fd)
    os.close(fd)


def key_load(path, ask, force=False):
    """The Key in file `path`.

    `ask(path)` gives the passphrase (bytes) if one is needed; `force` lifts
    the limits on what deriving it may cost.
    """
    try:
        with open(path, 'rb') as file:
            text = file.read(KEY_LONGEST + 1)
    except OSError as e:
        raise UserError('Cannot read key file %s: %s'
                        % (path, e.strerror)) from None
    if len(text) > KEY_LONGEST:
        raise UserError('%s: too long for a key file' % path)
    content = key_untext(text, path)
    if content.startswith(b'scrypt\x00'):
        content = scrypt_decrypt(content, lambda: ask(path), path, force)
    return key_decode(content, path)


# The format of scrypt(1): "scrypt" 0 logN(1) r(4) p(4) salt(32), the first 16
# bytes of the SHA-256 of those 48, an HMAC-SHA256 of those 64, AES-256-CTR
# text, and an HMAC-SHA256 of everything.  The counter starts at zero, so a
# salt is never used twice.

SCRYPT_HEAD = struct.Struct('>7sBII32s')
SCRYPT_SECONDS = 300        # what deriving a key may cost without --force


def scrypt_derive(passphrase, salt, log_n, r, p, length=64):
    """scrypt (RFC 7914).  hashlib cannot go to 2 GiB in any version."""
    n = 1 << log_n
    need = 128 * r * (n + p + 2)
    if need < (1 << 31) - MIB:
        return hashlib.scrypt(passphrase, salt=salt, n=n, r=r, p=p,
                              maxmem=need + MIB, dklen=length)
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    return Scrypt(salt=salt, length=length, n=n, r=r, p=p).derive(passphrase)


def memory_size():
    """Bytes of physical memory."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def scrypt_speed():
    """Seconds for one salsa20/8-mixed byte: scrypt's time over 128*N*r*p."""
    log_n, spent = 10, 0.0
    while spent < 0.02:
        log_n += 1
        start = time.perf_counter()
        scrypt_derive(b'', b'', log_n, 8, 1)
        spent = time.perf_counter() - start
    return spent / (128 * 8 << log_n)


def scrypt_encrypt(content, passphrase, memory, seconds):
    """`content` in the format of scrypt(1), costing about `seconds`."""
    limit = min(memory or memory_size(), memory_size() // 2)
    budget = min(seconds / scrypt_speed(), limit)
    log_n = max(10, int(budget / (128 * 8)).bit_length() - 1)
    salt = os.urandom(32)
    head = SCRYPT_HEAD.pack(b'scrypt\x00', log_n, 8, 1, salt)
    head += sha256(head)[:16]
    derived = scrypt_derive(passphrase, salt, log_n, 8, 1)
    head += hmac.digest(derived[32:], head, 'sha256')
    text = head + aes_ctr(derived[:32], content)
    return text + hmac.digest(derived[32:], text, 'sha256')


def scrypt_decrypt(text, passphrase, path, force=False):
    """What scrypt(1) or scrypt_encrypt closed.

    The parameters are not authenticated before the work is done, so they are
    checked for what they cost; `passphrase()` is asked after that.
    """
    if len(text) < 128:
        raise UserError('%s: key file is damaged (cut short)' % path)
    head = text[:SCRYPT_HEAD.size]
    magic, log_n, r, p, salt = SCRYPT_HEAD.unpack(head)
    if sha256(head)[:16] != text[48:64]:
        raise UserError('%s: key file is damaged (checksum of its scrypt '
                        'header differs)' % path)
    if not (1 <= log_n <= 63 and log_n < 16 * r and 1 <= p
            and r * p < 1 << 30):
        raise UserError('%s: key file has impossible scrypt parameters' % path)
    work = (128 * r) << log_n
    if not force and (work + 128 * r * p > memory_size() // 2
                      or work * p * scrypt_speed() > SCRYPT_SECONDS):
        raise UserError('%s: opening this key file would take too much '
                        'memory or time; --force-resources does it anyway'
                        % path)
    derived = scrypt_derive(passphrase(), salt, log_n, r, p)
    if not hmac.compare_digest(hmac.digest(derived[32:], text[:64], 'sha256'),
                               text[64:96]):
        raise UserError('Passphrase is incorrect for key file %s' % path)
    if not hmac.compare_digest(hmac.digest(derived[32:], text[:-32], 'sha256'),
                               text[-32:]):
        raise UserError('%s: key file is damaged (its HMAC differs)' % path)
    return aes_ctr(derived[:32], text[96:-32])


def aes_ctr(key, data):
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, \
        modes
    worker = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return worker.update(data) + worker.finalize()


PROMPT = 'Please enter passphrase for keyfile %s: '


def ask_passphrase(method, taken=None):
    """A function path -> passphrase (bytes) for `--passphrase METHOD:ARG`.

    `taken` names what else reads standard input, if anything does: of a tar
    file the rest, where the passphrase is asked to be the first line.
    """
    kind, _, arg = method.partition(':')
    if kind == 'dev' and arg in ('tty-stdin', 'tty-once', 'stdin-once'):
        return lambda path: passphrase_dev(arg, PROMPT % path, taken)
    if kind == 'env' and arg:
        return lambda path: passphrase_env(arg)
    if kind == 'file' and arg:
        return lambda path: passphrase_file(arg)
    raise UserError('Invalid passphrase method: %s' % method)


def passphrase_dev(source, prompt, taken=None):
    """From the terminal if there is one, else a line of standard input."""
    if source != 'stdin-once':
        try:
            fd = os.open('/dev/tty', os.O_RDWR | os.O_NOCTTY)
        except OSError:
            if source == 'tty-once':
                raise UserError('No terminal to ask for the passphrase on') \
                    from None
        else:
            return passphrase_tty(fd, prompt)
    if sys.stdin is None:
        raise UserError('No terminal and no standard input to read the '
                        'passphrase from')
    if taken and (taken, source) != ('@-', 'stdin-once'):
        raise UserError('Standard input is read by %s; take the passphrase '
                        'from elsewhere (--passphrase file:PATH or env:NAME)'
                        % taken)
    if os.isatty(0):
        return passphrase_tty(os.dup(0), prompt)
    line = line_read(0)
    if not line:                # as in a job of cron; none can be empty
        raise UserError('No passphrase on standard input%s; --passphrase '
                        'file:PATH or env:NAME takes it from elsewhere' % (
                            ', and no terminal to ask on' * (
                                source != 'stdin-once')))
    return line


def passphrase_tty(fd, prompt, out=None):
    """Ask on terminal `fd`, which is closed; without echo.

    The prompt goes to descriptor `out`, by default to the terminal; after
    echo is off, since what was typed before that is thrown away.
    """
    out = fd if out is None else out
    import termios
    try:
        old = termios.tcgetattr(fd)
        new = termios.tcgetattr(fd)
        new[3] &= ~termios.ECHO
        termios.tcsetattr(fd, termios.TCSAFLUSH, new)
        try:
            write_all(out, os.fsencode(prompt))
            line = line_read(fd)
            write_all(out, b'\n')
        finally:
            termios.tcsetattr(fd, termios.TCSAFLUSH, old)
    finally:
        os.close(fd)
    return line


def line_read(fd):
    """One line from `fd`, not a byte further, without its newline."""
    line = bytearray()
    while len(line) <= 2048:
        byte = os.read(fd, 1)
        if byte in (b'', b'\n'):
            return bytes(line)
        line += byte
    raise UserError('Line too long for a passphrase')


def passphrase_env(name):
    if os.fsencode(name) not in os.environb:
        raise UserError('Environment variable %s, for the passphrase, is not '
                        'set' % name)
    return os.environb[os.fsencode(name)]


def passphrase_file(path):
    """The only line of file `path`."""
    try:
        with open(path, 'rb') as file:
            text = file.read(2048 + len('\r\n') + 1)
    except OSError as e:
        raise UserError('Cannot read passphrase file %s: %s'
                        % (path, e.strerror)) from None
    line, _, rest = text.partition(b'\n')
    if rest or len(line.rstrip(b'\r')) > 2048:
        raise UserError('%s: a passphrase file has one line of at most 2048 '
                        'bytes' % path)
    return line.rstrip(b'\r')


##############################################################################
# Formats: rows, index blocks, records
#
# The plain bytes of everything but chunks: tarsnap-format(5).  A page holds
# the rows of a run of entries; a list holds the names of pages, or of the
# extents of one large file.  No plaintext here holds anything that is not a
# function of the tree.  Encoding and decoding only.
##############################################################################

FILE, DIRECTORY, SYMLINK, FIFO, CHARDEV, BLOCKDEV = b'-dlpcb'
KIND_OF_MODE = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY,
                stat.S_IFLNK: SYMLINK, stat.S_IFIFO: FIFO,
                stat.S_IFCHR: CHARDEV, stat.S_IFBLK: BLOCKDEV}

# Row flags.
HAS_LINK, HAS_XATTRS, HAS_DIGEST, HAS_ATIME, IN_LISTS = 1, 2, 4, 8, 16

HOLE = 0xffffffff           # kid index of an extent that is a hole
INLINE_XATTR = 4096         # a longer value is a chunk of its own
MOST_EXTENTS = 64           # of a row; of a record, pages
LONGEST_PATH = 65535

ROW_HEAD = struct.Struct('>BBHIIqIQH')
LINK = struct.Struct('>QI')
ATIME = struct.Struct('>qI')
DEVICE = struct.Struct('>II')
EXTENT = struct.Struct('>IIQI')         # kid, offset, length, repeat
KID = struct.Struct('>c32sII')          # class, name, plain length, times
KID_NAME = struct.Struct('>x32s8x')     # the name alone

PAGE, PAGE_LIST, EXTENT_LIST = 1, 2, 3  # kinds of index block
INDEX_HEAD = struct.Struct('>BB32sI')   # kind, level, rows digest, kids

BILLION = 10 ** 9


class Kid:
    """A reference to a block: what a refs part holds of it."""

    __slots__ = ('cls', 'name', 'plain', 'times')

    def __init__(self, cls, name, plain, times=1):
        self.cls = cls          # CHUNK or INDEX
        self.name = name
        self.plain = plain      # plain length, bytes
        self.times = times      # extents that use it, or 1

    def pack(self):
        return KID.pack(self.cls, self.name, self.plain, self.times)


class Entry:
    """One member of an archive.  Paths and names are bytes.

    `extents` are (kid, offset, length, repeat): `length` bytes from `offset`
    of that kid of the page, `repeat` times over; or (HOLE, 0, length, 1).
    With `lists` set they stand in those list blocks instead, `level` deep.
    """

    __slots__ = ('kind', 'mode', 'uid', 'gid', 'uname', 'gname', 'mtime',
                 'atime', 'size', 'path', 'target', 'device', 'link',
                 'xattrs', 'digest', 'extents', 'lists', 'level')

    def __init__(self):
        self.kind = FILE
        self.mode = 0           # permission bits, 07777
        self.uid = self.gid = 0
        self.uname = self.gname = b''
        self.mtime = 0          # nanoseconds since 1970
        self.atime = None       # the same, or not stored
        self.size = 0           # bytes of content
        self.path = b''
        self.target = b''       # of a symbolic link
        self.device = (0, 0)    # major, minor
        self.link = None        # (inode, ordinal of file system) if nlink > 1
        self.xattrs = ()        # (name, value bytes or kid number)
        self.digest = b''       # 16 bytes, if content is in shared chunks
        self.extents = ()
        self.lists = ()         # kid numbers of EXTENT_LIST blocks
        self.level = 0          # of those lists


def row_pack(entry):
    """The bytes of one row, with its length in front."""
    kind, flags = entry.kind, 0
    tail = b'%c%b%c%b' % (len(entry.uname), entry.uname,
                          len(entry.gname), entry.gname)
    if kind == SYMLINK:
        tail += U16.pack(len(entry.target)) + entry.target
    elif kind in (CHARDEV, BLOCKDEV):
        tail += DEVICE.pack(*entry.device)
    if entry.link:
        flags |= HAS_LINK
        tail += LINK.pack(*entry.link)
    if entry.atime is not None:
        flags |= HAS_ATIME
        tail += ATIME.pack(*divmod(entry.atime, BILLION))
    if entry.xattrs:
        flags |= HAS_XATTRS
        tail += xattrs_pack(entry.xattrs)
    if entry.digest:
        flags |= HAS_DIGEST
        tail += entry.digest
    if entry.lists:
        flags |= IN_LISTS
        tail += struct.pack('>BH%dI' % len(entry.lists), entry.level,
                            len(entry.lists), *entry.lists)
    elif kind == FILE:
        extents = entry.extents
        tail += U16.pack(len(extents))
        for extent in extents:
            tail += EXTENT.pack(*extent)
    seconds, nanos = divmod(entry.mtime, BILLION)
    path = entry.path
    return U32.pack(ROW_HEAD.size + len(path) + len(tail)) + ROW_HEAD.pack(
        kind, flags, entry.mode, entry.uid, entry.gid, seconds, nanos,
        entry.size, len(path)) + path + tail


def xattrs_pack(xattrs):
    """(name, value bytes or kid number) pairs, counted."""
    out = [U16.pack(len(xattrs))]
    for name, value in xattrs:
        out += (U8.pack(len(name)), name)
        if isinstance(value, int):
            out.append(struct.pack('>BI', 1, value))
        else:
            out += (struct.pack('>BI', 0, len(value)), value)
    return b''.join(out)


def row_unpack(reader, kids):
    """The next Entry of a page with `kids` kids, every field checked."""
    row = Reader(reader.take(reader.u32()), reader.what)
    entry = Entry()
    (entry.kind, flags, entry.mode, entry.uid, entry.gid, seconds, nanos,
     entry.size, length) = row.unpack(ROW_HEAD)
    entry.mtime = seconds * BILLION + nanos
    entry.path = row.take(length)
    entry.uname = row.take(row.u8())
    entry.gname = row.take(row.u8())
    if entry.kind == SYMLINK:
        entry.target = row.take(row.u16())
    elif entry.kind in (CHARDEV, BLOCKDEV):
        entry.device = row.unpack(DEVICE)
    if flags & HAS_LINK:
        entry.link = row.unpack(LINK)
    if flags & HAS_ATIME:
        seconds, nanos = row.unpack(ATIME)
        entry.atime = seconds * BILLION + nanos
    if flags & HAS_XATTRS:
        entry.xattrs = xattrs_unpack(row, kids)
    if flags & HAS_DIGEST:
        entry.digest = row.take(16)
    if flags & IN_LISTS:
        entry.level, count = row.u8(), row.u16()
        entry.lists = tuple(kid_check(row, row.u32(), kids)
                            for _ in range(count))
    elif entry.kind == FILE:
        entry.extents = extents_unpack(row, row.u16(), kids)
    row.end()
    row_check(entry, row.what)
    return entry


def kid_check(reader, number, kids):
    """A row names blocks only through its own page's refs part."""
    if number >= kids:
        raise CorruptError('%s: kid %d of %d' % (reader.what, number, kids))
    return number


def xattrs_unpack(row, kids):
    out = []
    for _ in range(row.u16()):
        name = row.take(row.u8())
        chunk, value = row.u8(), row.u32()
        out.append((name, kid_check(row, value, kids) if chunk
                    else row.take(value)))
    return tuple(out)


def extents_unpack(reader, count, kids):
    """`count` extents; lengths and kid numbers checked."""
    out = []
    for _ in range(count):
        kid, offset, length, repeat = extent = reader.unpack(EXTENT)
        if kid == HOLE:
            if offset or repeat != 1:
                raise CorruptError('%s: malformed hole' % reader.what)
        else:
            kid_check(reader, kid, kids)
            if not length or not repeat \
                    or offset + length > CEILING['chunk']:
                raise CorruptError('%s: malformed extent' % reader.what)
        out.append(extent)
    return tuple(out)


def row_check(entry, what):
    """What holds of every row, whoever wrote it."""
    if entry.kind not in b'-dlpcb' or entry.mode > 0o7777 \
            or not entry.path or b'\0' in entry.path:
        raise CorruptError('%s: malformed row' % what)
    if entry.kind == FILE and not entry.lists:
        total = sum(length * repeat for _, _, length, repeat in entry.extents)
        if total != entry.size:
            raise CorruptError('%s: %s: extents hold %d of %d bytes' % (
                what, show(entry.path), total, entry.size))


class IndexBlock:
    """A decoded page or list.

    For a PAGE `rows` is the plain rows part; for a PAGE_LIST `notes` has
    (first member name, entries, bytes) for each kid; for an EXTENT_LIST of
    level 1 `extents`, above that `notes` with the bytes below each kid.
    """

    __slots__ = ('name', 'kind', 'level', 'digest', 'kids', 'rows')

    def __init__(self, kind, level, digest, kids, rows=b'', name=b''):
        self.name = name
        self.kind = kind
        self.level = level      # 0 for pages; lists of those are 1, and so on
        self.digest = digest    # of the rows part
        self.kids = kids        # list of Kid
        self.rows = rows        # plain rows part, empty if not opened


def index_refs(kind, level, digest, kids):
    """The refs part: what the block's name is the hash of."""
    return b''.join([INDEX_HEAD.pack(kind, level, digest, len(kids))]
                    + [kid.pack() for kid in kids])


def index_unpack(refs, name):
    """The IndexBlock in a plain refs part (its name already compared)."""
    reader = Reader(refs, 'index block %s' % name.hex()[:16])
    kind, level, digest, count = reader.unpack(INDEX_HEAD)
    if kind not in (PAGE, PAGE_LIST, EXTENT_LIST) or (kind == PAGE) != (
            level == 0) or count * KID.size != reader.left():
        raise CorruptError('%s: malformed' % reader.what)
    kids = [Kid(*reader.unpack(KID)) for _ in range(count)]
    if any(kid.cls not in (CHUNK, INDEX) for kid in kids):
        raise CorruptError('%s: malformed reference' % reader.what)
    return IndexBlock(kind, level, digest, kids, name=name)


def page_entries(block):
    """The entries of a decoded page, one by one."""
    reader = Reader(block.rows, 'page %s' % block.name.hex()[:16])
    while reader.left():
        yield row_unpack(reader, len(block.kids))


def list_notes_pack(notes):
    """Rows part of a list of pages: (first member, entries, bytes) each."""
    return b''.join(U16.pack(len(first)) + first + U64.pack(entries)
                    + U64.pack(size) for first, entries, size in notes)


def list_notes(block):
    """What list_notes_pack packed."""
    reader = Reader(block.rows, 'list %s' % block.name.hex()[:16])
    out = [(reader.take(reader.u16()), reader.u64(), reader.u64())
           for _ in block.kids]
    reader.end()
    return out


def list_extents(block):
    """The extents in a list of level 1."""
    reader = Reader(block.rows, 'list %s' % block.name.hex()[:16])
    if reader.left() % EXTENT.size:
        raise CorruptError('%s: malformed' % reader.what)
    return extents_unpack(reader, reader.left() // EXTENT.size,
                          len(block.kids))


RECORD_MAGIC = b'tarsnap-archive-1\x00'
RECORD_HEAD = struct.Struct('>Q32s16s16s16sQ32sBBBQQQ32s32sH')


class Record:
    """An archive: what it is called, when, by whom, and where it begins."""

    __slots__ = ('name', 'machine', 'archive', 'series', 'lineage', 'tid',
                 'base', 'complete', 'sorted', 'level', 'entries', 'pages',
                 'bytes', 'kids', 'title', 'created', 'argv', 'host')

    def __init__(self):
        self.name = b''         # of the record block
        self.machine = 0
        self.archive = b''      # archive id
        self.series = b''       # series tag, 16 bytes
        self.lineage = b''      # of the run that made it, 16 bytes
        self.tid = b''          # transaction
        self.base = (0, b'')    # history it was built on: n, H_n
        self.complete = True    # False for a checkpoint
        self.sorted = False     # names rise, compared component by component
        self.level = 0          # of the kids: 0 pages, else lists
        self.entries = self.pages = self.bytes = 0
        self.kids = []
        self.title = b''        # NAME
        self.created = 0        # seconds, as the client claims
        self.argv = []          # creating command line
        self.host = b''


def record_pack(record, key):
    """The plain parts (refs, names, meta) of a record, signed by W."""
    names = (os.urandom(16) + U16.pack(len(record.title)) + record.title
             + U64.pack(record.created))
    meta = os.urandom(16) + U16.pack(len(record.host)) + record.host
    meta += U32.pack(len(record.argv))
    meta += b''.join(U32.pack(len(arg)) + arg for arg in record.argv)
    refs = RECORD_MAGIC + RECORD_HEAD.pack(
        record.machine, record.archive, record.series, record.lineage,
        record.tid, *record.base, record.complete, record.sorted,
        record.level, record.entries, record.pages, record.bytes,
        sha256(names), sha256(meta), len(record.kids))
    refs += b''.join(kid.pack() for kid in record.kids)
    return [refs + sign(key.sign_privs[ROLE_WRITE], refs), names, meta]


def record_unpack(parts, name, key):
    """The Record in plain `parts` (two for a pruning key); signature checked.

    The caller has compared the block's name.
    """
    refs, names = parts[0], parts[1]
    record = Record()
    record.name = name
    reader = Reader(refs, 'archive record %s' % name.hex()[:16])
    if reader.take(len(RECORD_MAGIC)) != RECORD_MAGIC:
        raise Unclear('%s: unknown version' % reader.what)
    if not verify(key.sign_pubs[ROLE_WRITE], refs[-64:], refs[:-64]):
        raise CorruptError('%s: not signed by this machine\'s write key'
                           % reader.what)
    (record.machine, record.archive, record.series, record.lineage,
     record.tid, n, head, complete, ordered, record.level, record.entries,
     record.pages, record.bytes, names_digest, meta_digest,
     count) = reader.unpack(RECORD_HEAD)
    record.base = (n, head)
    record.complete, record.sorted = bool(complete), bool(ordered)
    record.kids = [Kid(*reader.unpack(KID)) for _ in range(count)]
    reader.take(64)
    reader.end()
    if record.machine != key.machine:
        raise CorruptError('%s: belongs to another machine' % reader.what)
    if sha256(names) != names_digest or (len(parts) > 2 and
                                         sha256(parts[2]) != meta_digest):
        raise CorruptError('%s: parts of two records mixed' % reader.what)
    record_names(record, names)
    if len(parts) > 2:
        record_meta(record, parts[2])
    if Names(key).archive(record.title) != record.archive:
        raise CorruptError('%s: stored under the wrong archive id'
                           % reader.what)
    return record


def record_names(record, part):
    reader = Reader(part, 'archive record %s' % record.name.hex()[:16])
    reader.take(16)
    record.title = reader.take(reader.u16())
    record.created = reader.u64()
    reader.end()


def record_meta(record, part):
    reader = Reader(part, 'archive record %s' % record.name.hex()[:16])
    reader.take(16)
    record.host = reader.take(reader.u16())
    record.argv = [reader.take(reader.u32()) for _ in range(reader.u32())]
    reader.end()


# One date or time in an archive's name is what makes it one of a series.
SERIES_DATE = re.compile(
    rb'(?<!\d)(?:\d{4}-\d\d-\d\d|\d{8})'
    rb'(?:[-_T. ]?\d\d[-:_.]?\d\d(?:[-:_.]?\d\d)?(?!-?\d))?(?!\d)'
    rb'|(?<!\d)1\d{9}(?!\d)')


def series_of(title):
    """The series an archive called `title` belongs to, without --series.

    NAME with its one recognised date replaced by '#'; with none, or several,
    NAME itself: a wrong guess must keep too much, never too little.
    """
    found = SERIES_DATE.findall(title)
    return SERIES_DATE.sub(b'#', title) if len(found) == 1 else title


##############################################################################
# Formats: the signed history
#
# Each commit names its predecessor's hash and the digest of all live archives,
# and is signed by the key that made it.  The server stores it verbatim.
##############################################################################

COMMIT_MAGIC = b'tarsnap-commit-1'
COMMIT_HEAD = struct.Struct('>QQ32sB16s')
LINKED = struct.Struct('>32s32s16sB')
UNLINKED = struct.Struct('>32s32s')
COUNTED = struct.Struct('>Q32s')
EVERYTHING = 0xffffffffffffffff         # deleted count of a nuke
NOTHING = sha256(b'')
HISTORY_CONTEXT = b'tarsnap-history-1\x00'


class Commit:
    """One step of a machine's history."""

    __slots__ = ('machine', 'n', 'previous', 'kind', 'tid', 'linked',
                 'unlinked', 'puts', 'deleted', 'live', 'note')

    def __init__(self, machine, n, previous, kind, tid):
        self.machine = machine
        self.n = n
        self.previous = previous        # H_{n-1}
        self.kind = kind                # KIND_*
        self.tid = tid                  # transaction id
        self.linked = []                # (archive id, record, lineage, state)
        self.unlinked = []              # (archive id, record)
        self.puts = (0, NOTHING)        # count, SHA-256 of names put
        self.deleted = (0, NOTHING)     # count, SHA-256 of names deleted
        self.live = NOTHING             # digest of all live archives
        self.note = b''                 # sealed statistics


def commit_pack(commit, key):
    """C_n, signed by the role its kind calls for."""
    body = b''.join(
        [COMMIT_MAGIC, COMMIT_HEAD.pack(commit.machine, commit.n,
                                        commit.previous, commit.kind,
                                        commit.tid),
         U16.pack(len(commit.linked))]
        + [LINKED.pack(*link) for link in commit.linked]
        + [U16.pack(len(commit.unlinked))]
        + [UNLINKED.pack(*link) for link in commit.unlinked]
        + [COUNTED.pack(*commit.puts), COUNTED.pack(*commit.deleted),
           commit.live, U16.pack(len(commit.note)), commit.note])
    private = key.sign_privs[KIND_ROLE[commit.kind]]
    return body + sign(private, HISTORY_CONTEXT + body)


def commit_unpack(data, key):
    """The Commit in C_n; its signature and machine are checked."""
    reader = Reader(data, 'commit')
    if reader.take(len(COMMIT_MAGIC)) != COMMIT_MAGIC:
        raise CorruptError('commit: unknown version')
    commit = Commit(*reader.unpack(COMMIT_HEAD))
    reader.what = 'commit %d' % commit.n
    commit.linked = [reader.unpack(LINKED) for _ in range(reader.u16())]
    commit.unlinked = [reader.unpack(UNLINKED) for _ in range(reader.u16())]
    commit.puts = reader.unpack(COUNTED)
    commit.deleted = reader.unpack(COUNTED)
    commit.live = reader.take(32)
    commit.note = reader.take(reader.u16())
    signature = reader.take(64)
    reader.end()
    if commit.machine != key.machine:
        raise CorruptError('%s: of another machine' % reader.what)
    role = KIND_ROLE.get(commit.kind)
    if role is None or not verify(key.sign_pubs[role], signature,
                                  HISTORY_CONTEXT + bytes(data[:-64])):
        raise CorruptError('%s: signature is wrong: this is not the history '
                           'this machine\'s keys made' % reader.what)
    return commit


def live_digest(archives):
    """SHA-256 of all live archives; `archives`: id -> (record, ..., state)."""
    return sha256(b''.join([archive + link[0] + U8.pack(link[2])
                            for archive, link in sorted(archives.items())]))


# Statistics after a commit: All archives, (unique data), This archive, New
# data, each as (total, compressed) bytes; and the number of archives.
TOTALS = struct.Struct('>9Q')


def note_seal(key, n, totals):
    """The statistics in C_n, for every host that holds mix-refs."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    nonce = os.urandom(NONCE)
    sealed = AESGCM(hmac.digest(key.mix_refs, b'tarsnap-note-1', 'sha256'))
    return nonce + sealed.encrypt(nonce, TOTALS.pack(*totals),
                                  U64.pack(key.machine) + U64.pack(n))


def note_open(key, commit):
    """The nine totals in a commit's note; zeros where there is none."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    if not commit.note:
        return (0,) * 9
    sealed = AESGCM(hmac.digest(key.mix_refs, b'tarsnap-note-1', 'sha256'))
    try:
        plain = sealed.decrypt(commit.note[:NONCE], commit.note[NONCE:],
                               U64.pack(key.machine) + U64.pack(commit.n))
        return TOTALS.unpack(plain)
    except (InvalidTag, struct.error, ValueError):
        raise CorruptError('commit %d: its note does not open'
                           % commit.n) from None


##############################################################################
# Chunks: where a stream of bytes is cut
#
# A chunk ends after byte i iff the first 16 bits of AES-128_k(bytes i-15 .. i)
# are zero.  A window is one AES block, so there is no hash and no collision
# term, and a boundary tells about those 16 bytes only.  Owns the cut rule and
# its buffers; knows nothing of files, names or the network.
##############################################################################

CHUNK_MIN = 16 * KIB
CHUNK_MAX = CEILING['chunk']
WINDOW = 16
SCAN = 256 * KIB            # bytes encrypted at once: stays in the L2 cache
FEED = 128 * KIB            # bytes collected before they are scanned
PIECE = 512 * KIB           # of what comes at once, scanned at once
SCANS = 4                   # pieces of a stream being scanned at most
WEAK = 16                   # first 16 bits below this: 12 of them are zero


def cut_key(key):
    """The AES key that a Key cuts with."""
    return hmac.digest(key.k_cut, b'cut', 'sha256')[:16]


class Scan:
    """Where chunks may end in a piece of a stream; known sooner or later."""

    __slots__ = ('crew', 'length', 'hits')

    def __init__(self, length, hits=None, crew=None):
        self.length = length    # bytes of the piece
        self.hits = hits        # rising (end, first 16 bits); None: not yet
        self.crew = crew        # who looks for them

    def wait(self):
        """The hits."""
        while self.hits is None:
            self.crew.collect()
        return self.hits


class Scanner:
    """Finds the windows below WEAK.  A Crew does the same in its workers:
    what it finds does not depend on where chunks begin.
    """

    __slots__ = ('aes', 'out')

    def __init__(self, key):
        from cryptography.hazmat.primitives.ciphers import Cipher, \
            algorithms, modes
        self.aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        self.out = bytearray(SCAN + WINDOW)

    def scan(self, before, data):
        """The Scan of two pieces together."""
        return Scan(len(before) + len(data), self.hits(before + data))

    def hits(self, buf):
        """Rising (end, value) of the windows in `buf`, value < WEAK.

        Sixteen calls, one for each alignment, hold every window once.
        """
        hits = []
        view, out = memoryview(buf), self.out
        for base in range(0, len(buf) - WINDOW + 1, SCAN):
            piece = view[base:base + SCAN + WINDOW - 1]
            for shift in range(min(WINDOW, len(piece) - WINDOW + 1)):
                length = (len(piece) - shift) & -WINDOW
                self.aes.update_into(piece[shift:shift + length], out)
                find = out[0:length:WINDOW].find
                at = find(0)
                while at >= 0:
                    value = out[at * WINDOW + 1]
                    if value < WEAK:
                        hits.append((base + shift + (at + 1) * WINDOW, value))
                    at = find(0, at + 1)
        hits.sort()
        return hits


class Cutter:
    """Cuts one stream.  Mean chunk about 80 KiB.

    Where no window ends a chunk up to CHUNK_MAX, it ends after the last of
    the smallest windows of those with 12 zero bits; where there is none, at
    CHUNK_MAX.  (One byte inserted into 32 MB of records of one size re-sends
    0.3 MB with that rule, 3.3 MB without.)

    To find the windows is nearly all of the work, 2.9 s for a GB: the `crew`
    does it, some pieces ahead of the cuts, which are made here in order.
    """

    __slots__ = ('scanner', 'crew', 'fresh', 'waiting', 'last', 'asked',
                 'tail', 'hits')

    def __init__(self, scanner, crew=None):
        """Without a `crew` the `scanner` does it, here and now."""
        self.scanner = scanner
        self.crew = crew or scanner
        self.drop()

    def drop(self):
        """Forget the stream; another one may begin."""
        self.fresh = []         # what came and is not being scanned yet
        self.waiting = 0        # bytes of that
        self.last = b''         # bytes before it that its first windows need
        self.asked = collections.deque()    # (piece, bytes before it, Scan)
        self.tail = b''         # what was scanned since the last cut
        self.hits = []          # (end, first 16 bits) in tail, rising

    def feed(self, data):
        """Take more of the stream; the chunks that are known to have ended,
        as memoryviews.

        Where it is cut does not depend on the pieces it comes in.
        """
        if len(data) > PIECE:
            view = memoryview(data)
            return [chunk for at in range(0, len(data), PIECE)
                    for chunk in self.feed(view[at:at + PIECE])]
        self.fresh.append(data)
        self.waiting += len(data)
        if self.waiting < FEED:
            return []
        self.ask(self.crew)
        return self.cut(SCANS)

    def ask(self, scanner):
        """Have scanned what was collected."""
        data = b''.join(self.fresh)
        self.asked.append((data, len(self.last),
                           scanner.scan(self.last, data)))
        self.last = (self.last + data[1 - WINDOW:])[1 - WINDOW:]
        self.fresh, self.waiting = [], 0

    def finish(self):
        """End the stream: its last chunks."""
        if self.fresh:
            self.ask(self.scanner)      # it would be waited for
        out = self.cut()
        if self.tail:
            out.append(memoryview(self.tail))
        self.drop()
        return out

    def cut(self, most=0):
        """The chunks that end in what was scanned; waits until at most `most`
        pieces are being scanned.
        """
        out = []
        while self.asked and (len(self.asked) > most
                              or self.asked[0][2].hits is not None):
            data, before, scan = self.asked.popleft()
            out += self.take(data, len(self.tail) - before, scan.wait())
        return out

    def take(self, data, at, hits):
        """The chunks that end in the next piece; its hits count from `at`."""
        buf = self.tail + data
        hits = self.hits + [(end + at, value) for end, value in hits]
        view, out, start, first = memoryview(buf), [], 0, 0
        while True:
            end, first = self.end(hits, first, start, len(buf))
            if end is None:
                break
            out.append(view[start:end])
            start = end
        self.tail = buf[start:]
        self.hits = [(end - start, value) for end, value in hits[first:]]
        return out

    def end(self, hits, first, start, length):
        """Where the chunk at `start` ends, or None if it is not known yet.

        Looks at hits[first:]; also returns how many hits lie behind.
        """
        weakest, at = WEAK, None
        number = first
        while number < len(hits):
            end, value = hits[number]
            if end - start > CHUNK_MAX:
                break
            number += 1
            if end - start < CHUNK_MIN:
                first = number
            elif not value:
                return end, number
            elif value <= weakest:
                weakest, at = value, end
        if length - start < CHUNK_MAX:
            return None, first
        end = at or start + CHUNK_MAX
        while first < len(hits) and hits[first][0] <= end:
            first += 1
        return end, first


##############################################################################
# Channel: a session with a server
#
# One thread moves frames between two queues and a link: TLS, the pipes of an
# ssh, or a directory served in this process.  Above it nobody sees which.
# Checks who the server is before anything leaves; knows frames, not blocks.
##############################################################################

CONNECT_SECONDS = 30
SILENCE = 600               # seconds; a server at work says BUSY every 5
READ_SIZE = 256 * KIB
QUEUED_MOST = 8 * MIB       # bytes that came and are waited for by nobody yet;
#                             then no more is read
QUEUED_SECONDS = 0.02       # until that is looked at again
QUEUED_HERE = MIB           # the same of a server in this process
FRAME_COST = 200            # bytes a frame takes besides its body
ANSWER_MOST = 256 * MIB     # bytes of one answer that is kept whole
UNHURRIED = 512 * KIB       # bytes that may wait until something is asked; to
                            # wake the thread for each block costs 0.7 s in
                            # a run of 2 GB

# Seconds to wait before each try to connect again.
WAITS = (0, 0, 1, 2, 4, 8, 15, 30, 60, 90, 90)
FIRST_TRIES = 3             # where nothing was ever reached


LIMIT_SECONDS = 0.1         # what a limited connection moves at once, or saves
FRUITFUL = 64 * KIB         # bytes, or
FRUITFUL_SECONDS = 60       # after which a lost connection was worth it


class ChannelLost(RemoteError):
    """The connection broke; what was in flight may or may not have arrived."""


class Limit:
    """So many bytes a second in one direction, of all connections that share
    it.

    What has moved is paid for with time; what was not used lasts for
    LIMIT_SECONDS, which makes up for a sleep that was too long.
    """

    def __init__(self, rate, clock=time.monotonic, sleep=time.sleep):
        self.rate = rate                # bytes a second
        self.step = max(512, int(rate * LIMIT_SECONDS))     # bytes at once
        self.clock = clock
        self.sleep = sleep
        self.lock = threading.Lock()
        self.paid = clock()             # when all that moved is paid for

    def wait(self):
        """Seconds until more may move."""
        return max(0.0, self.paid - self.clock())

    def spend(self, size):
        """`size` bytes have moved."""
        with self.lock:
            self.paid = max(self.paid, self.clock() - LIMIT_SECONDS) \
                + size / self.rate

    def pass_through(self, size):
        """Let `size` bytes move, and wait as long as they take."""
        self.spend(size)
        self.sleep(self.wait())


class TlsLink:
    """Frames over TLS 1.3 to HOST:PORT."""

    transport = TRANSPORT_TLS

    def __init__(self, server, limited):
        """`limited` (sent, received): the kernel is to hold little of that,
        or it would move what we have not let pass yet.
        """
        self.limited = limited
        host, _, port = server.rpartition(':')
        host = host.strip('[]')
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError('Cannot obtain server address from "%s": give '
                            'HOST:PORT, a directory or ssh://HOST/DIR'
                            % server)
        self.address = (host, int(port))
        self.sock = None
        self.cert_hash = b''

    def open(self):
        """Connect and shake hands; nothing of ours is sent yet."""
        import socket
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False      # the pin decides, not a CA
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        where = '%s:%d' % self.address
        raw = self.connect(where)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self.sock = context.wrap_socket(raw)
            self.cert_hash = sha256(self.sock.getpeercert(True))
            self.sock.settimeout(0)
        except (OSError, ValueError) as e:
            raw.close()
            raise ChannelLost('Cannot speak TLS with %s: %s'
                              % (where, getattr(e, 'strerror', e) or e)) \
                from None

    def connect(self, where):
        """A socket connected to the server; ChannelLost if there is none."""
        import socket
        try:
            found = socket.getaddrinfo(*self.address, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:
            raise ChannelLost('Error looking up %s: %s' % (
                self.address[0], getattr(e, 'strerror', e))) from None
        error = None
        for family, kind, protocol, _, address in found:
            raw = socket.socket(family, kind, protocol)
            try:
                raw.settimeout(CONNECT_SECONDS)
                for option, limit in zip((socket.SO_SNDBUF, socket.SO_RCVBUF),
                                         self.limited):
                    if limit:       # before connecting, for the window
                        raw.setsockopt(socket.SOL_SOCKET, option,
                                       min(max(limit.step, 4096), MIB))
                raw.connect(address)
                return raw
            except OSError as e:
                raw.close()
                error = e
        raise ChannelLost('Cannot connect to %s: %s'
                          % (where, error.strerror or error)) from None

    def fileno(self):
        return self.sock.fileno()

    write_fileno = fileno

    def read(self, size):
        """What has come, up to `size` bytes; None for nothing yet, b'' for
        the end.
        """
        import ssl
        pieces = []                     # a record of TLS has 16 KB at most
        try:
            while size > 0:
                piece = self.sock.recv(size)
                if not piece:           # it will say so again
                    break
                pieces.append(piece)
                size -= len(piece)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError,
                BlockingIOError):
            if not pieces:
                return None
        except OSError:                 # after what came before it
            if not pieces:
                raise
        return b''.join(pieces)

    def write(self, view):
        """Send some of `view`; how much was taken."""
        import ssl
        try:
            return self.sock.send(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError,
                BlockingIOError):
            return 0

    def pending(self):
        return self.sock.pending()

    def close(self):
        if self.sock:
            self.sock.close()


class PipeLink:
    """Frames through `ssh HOST tarsnapd session --stdio DIR`."""

    transport = TRANSPORT_STDIO
    cert_hash = bytes(32)

    def __init__(self, server):
        host, slash, path = server[len('ssh://'):].partition('/')
        if not host or not path:
            raise UserError('Cannot obtain server address from "%s": give '
                            'ssh://HOST/DIR' % server)
        self.host = host
        self.path = slash + path
        self.child = None

    def command(self):
        """The argument list; a forced command at the far end ignores it."""
        import shlex
        host, _, port = self.host.rpartition(':')
        if not (host and port.isdigit()):
            host, port = self.host, ''
        words = 'session --stdio ' + shlex.quote(self.path)
        far = ('command -v tarsnapd >/dev/null && exec tarsnapd %s; '
               'exec tarsnapd.py %s' % (words, words))
        try:
            ssh = shlex.split(os.environ.get('TARSNAP_SSH') or 'ssh')
        except ValueError as e:
            raise UserError('TARSNAP_SSH is no command: %s' % e) from None
        return ssh + ['-T'] + (['-p', port] if port else []) + [host, far]

    def open(self):
        """Start ssh; it asks for what it wants on the terminal."""
        import subprocess
        command = self.command()
        try:
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                bufsize=0, close_fds=True)
        except OSError as e:
            raise UserError('Cannot run %s: %s'
                            % (command[0], e.strerror)) from None
        os.set_blocking(self.child.stdin.fileno(), False)
        os.set_blocking(self.child.stdout.fileno(), False)

    def fileno(self):
        return self.child.stdout.fileno()

    def write_fileno(self):
        return self.child.stdin.fileno()

    def read(self, size):
        try:
            return os.read(self.child.stdout.fileno(), size)
        except BlockingIOError:
            return None

    def write(self, view):
        try:
            return os.write(self.child.stdin.fileno(), view)
        except BlockingIOError:
            return 0

    def pending(self):
        return 0

    def close(self):
        """End the session: the far end sees its input closed."""
        if self.child:
            for pipe in (self.child.stdin, self.child.stdout):
                pipe.close()
            try:
                self.child.wait(5)
            except Exception:       # subprocess.TimeoutExpired, imported late
                self.child.kill()
                self.child.wait()


class ChildLink(PipeLink):
    """Frames to a store directory, served by a process of its own, which
    goes on seeing it when this one changes its root directory."""

    def __init__(self, server):
        self.path = os.path.abspath(server)
        self.child = None

    def command(self):
        import tarsnapd
        return [sys.executable, os.path.abspath(tarsnapd.__file__),
                'session', '--stdio', self.path]


class LocalLink:
    """Frames to a store directory, served in this process."""

    transport = TRANSPORT_DIR
    cert_hash = bytes(32)

    def __init__(self, server):
        self.path = server
        self.local = None

    def open(self):
        """Open the directory, in the thread that will serve it."""
        try:
            import tarsnapd
        except ImportError:
            raise UserError('The server of this key is directory %s, which '
                            'needs tarsnapd.py beside tarsnap.py'
                            % self.path) from None
        try:
            self.local = tarsnapd.open_local(self.path)
        except tarsnapd.ServerError as e:
            raise UserError(str(e)) from None

    def close(self):
        if self.local:
            self.local.close()


def link_make(server, apart=False, limits=(None, None)):
    """The link for a server's address.  `apart`: never in this process.
    `limits` as Channel has them.
    """
    if server.startswith('ssh://'):
        return PipeLink(server)
    if '/' in server or os.path.isdir(server):
        return ChildLink(server) if apart else LocalLink(server)
    return TlsLink(server, limits)


class Channel:
    """Frames out, answers in, over one link; used by any thread.

    Every waiting call raises ChannelLost once the link is gone.
    """

    def __init__(self, server, apart=False, limits=(None, None)):
        """`limits` are Limits of what is sent and of what is received, or
        None.
        """
        self.server = server
        self.link = link_make(server, apart, limits)
        self.up, self.down = limits
        self.changed = threading.Condition()    # guards all below
        self.out = collections.deque()          # frames not yet sent
        self.unhurried = 0                      # bytes of them, not waited for
        self.hurried = False                    # the thread is to take them
        self.answers = {}                       # request id -> deque
        self.queued = 0                         # bytes in these
        self.statement = None                   # body of the first frame
        self.unread = set()                     # ids no longer listened to
        self.received = 0                       # count in the last RECEIVED
        self.failed = None                      # why the link is gone
        self.opened = False                     # something answers
        self.closing = False
        self.waiting = 0                        # threads waiting for answers
        self.hungry = False                     # one began to wait since the
        #                                         last answer came
        self.resting = False                    # the thread has enough queued
        self.heard = time.monotonic()           # when something last came
        self.last = 0                           # last request id
        self.round_trips = 0                    # waits for an answer
        self.bytes_in = self.bytes_out = 0
        self.wake_r, self.wake_w = os.pipe()
        os.set_blocking(self.wake_r, False)
        os.set_blocking(self.wake_w, False)
        self.thread = thread_start(self.run)

    # The callers' side.

    def post(self, kind, *body):
        """Queue a request; its id.  The pieces of `body` are joined."""
        body = b''.join(body)
        with self.changed:
            if self.failed:
                raise self.failed
            self.last += 1
            rid = self.last
            self.answers[rid] = collections.deque()
            self.out.append((kind, rid, body))
            self.hurry()
        return rid

    def push(self, kind, body):
        """Queue a request that has no answer; it goes with the next that has
        one, with the next wait, or when UNHURRIED bytes are together.
        """
        with self.changed:
            if self.failed:
                raise self.failed
            self.last += 1
            self.out.append((kind, self.last, body))
            self.unhurried += len(body)
            if self.unhurried >= UNHURRIED:
                self.hurry()

    def hurry(self):
        """Have the thread take what is queued; `changed` is held."""
        if self.out and not self.hurried:
            self.hurried = True
            self.wake()

    def taken(self):
        """The queue is empty; `changed` is held."""
        self.hurried, self.unhurried = False, 0

    def ready(self, rid):
        """True if an answer to `rid` is there."""
        return bool(self.answers[rid])

    def next(self, rid):
        """The next answer to `rid` as (type, body)."""
        with self.changed:
            queue = self.answers[rid]
            if not queue:
                self.round_trips += 1
            while not queue:
                self.wait()
            kind, body = queue.popleft()
            self.queued -= FRAME_COST + len(body)
            self.unrest()
            return kind, body

    def wait(self):
        """Until something came, with `changed` held; raises ChannelLost."""
        if self.failed:
            raise self.failed
        self.hurry()
        if not self.waiting:
            self.heard = time.monotonic()
        self.waiting += 1
        self.hungry = True
        self.unrest()
        self.changed.wait()
        self.waiting -= 1

    def stream(self, rid):
        """Answers to `rid` up to its OK; a typed error raises Refused."""
        over = False
        try:
            while not over:
                kind, body = self.next(rid)
                over = kind == OK
                if kind == ERROR:
                    raise refusal(body)
                if kind not in (OK, BUSY):
                    yield kind, body
        finally:
            if not over:
                self.unread.add(rid)
            self.forget(rid)

    def call(self, kind, *body):
        """Ask, and return the one answer as (type, body)."""
        return self.reply(self.post(kind, *body))

    def reply(self, rid):
        """The one answer to request `rid` as (type, body)."""
        while True:
            kind, body = self.next(rid)
            if kind == BUSY:
                continue
            self.forget(rid)
            if kind == ERROR:
                raise refusal(body)
            return kind, body

    def forget(self, rid):
        with self.changed:
            for _, body in self.answers.pop(rid, ()):
                self.queued -= FRAME_COST + len(body)
            self.unrest()

    def wait_statement(self):
        """The server's first frame."""
        with self.changed:
            while self.statement is None:
                if self.failed:
                    raise self.failed
                if not self.changed.wait(CONNECT_SECONDS + 10):
                    raise ChannelLost('No answer from %s' % self.server)
            return self.statement

    def close(self):
        with self.changed:
            self.closing = True
            self.unrest()
        self.wake()
        # One that still waits for an answer to its call is not waited for.
        if self.opened and self.thread is not threading.current_thread():
            self.thread.join(15)

    def wake(self):
        try:
            os.write(self.wake_w, b'.')
        except (BlockingIOError, OSError):
            pass

    # The thread's side.

    def run(self):
        """The thread: until the link breaks or close()."""
        failed = ChannelLost('Connection closed')
        try:
            self.link.open()
            self.opened = True
            if self.link.transport == TRANSPORT_DIR:
                self.run_local()
            else:
                self.run_socket()
        except Error as e:
            failed = e
        except (OSError, ValueError) as e:
            failed = ChannelLost('Connection to %s lost: %s' % (
                self.server, getattr(e, 'strerror', None) or e))
        except Exception as e:      # a server in this process may do anything
            failed = RemoteError('%s: %s: %s' % (self.server,
                                                 type(e).__name__, e))
        finally:
            self.link.close()
            with self.changed:
                self.failed = failed
                self.changed.notify_all()
                os.close(self.wake_r)
                os.close(self.wake_w)
                self.wake_w = -1

    def run_local(self):
        """Serve requests in this thread; idle() when there are none."""
        import select
        local = self.link.local
        self.deliver(STATEMENT, 0, local.statement)
        while True:
            with self.changed:
                closing, frames = self.closing, ()
                if self.hurried or closing:
                    frames = list(self.out)
                    self.out.clear()
                    self.taken()
            for kind, rid, body in frames:
                if self.up:
                    self.up.pass_through(FRAME.size + len(body))
                self.answer(local.receive(kind, rid, body))
            if frames:
                continue
            self.answer(local.idle())
            if closing:
                return
            select.select([self.wake_r], [], [])
            os.read(self.wake_r, 4096)

    def answer(self, answers):
        """Deliver what the server in this process answers.

        It makes that as we take it, so what the callers have not come to yet
        need not be here: all of CHANGES is 0.5 MB for each GB stored.
        """
        for kind, rid, body in answers:
            if self.down:
                self.down.pass_through(FRAME.size + len(body))
            self.deliver(kind, rid, body)
            if self.queued > QUEUED_HERE and not self.rest():
                return

    def rest(self):
        """Until most of what is queued is taken; not while a thread waits for
        what has not come, as that may be after this.  False if nobody wants
        more.
        """
        with self.changed:
            while self.queued > QUEUED_HERE // 2 and not (
                    self.hungry or self.closing):
                self.resting = True
                self.changed.wait()
            self.resting = False
            return not self.closing

    def unrest(self):
        """Wake rest() if it is over; `changed` is held."""
        if self.resting and (self.queued <= QUEUED_HERE // 2 or self.hungry
                             or self.closing):
            self.changed.notify_all()

    def run_socket(self):
        """Move bytes both ways until close() and all is sent."""
        import selectors
        link, up, down, buf = self.link, self.up, self.down, bytearray()
        sending, done = memoryview(b''), False
        with selectors.DefaultSelector() as selector:
            selector.register(self.wake_r, selectors.EVENT_READ)
            while True:
                if not sending:
                    sending, done = self.gather()
                if done:
                    return
                wait_up = up.wait() if up and sending else 0
                if sending and not wait_up:
                    sent = link.write(sending[:up.step] if up else sending)
                    sending = sending[sent:]
                    if up:
                        up.spend(sent)
                        wait_up = up.wait()
                wait_down = down.wait() if down else 0
                if self.queued > QUEUED_MOST:   # as long as it takes
                    wait_down = max(wait_down, QUEUED_SECONDS)
                self.watch(selector, not wait_down,
                           bool(sending) and not wait_up)
                if wait_down or not link.pending():
                    self.listen(selector, [wait_up if sending else 0,
                                           wait_down])
                if wait_down:
                    continue
                data = link.read(down.step if down else READ_SIZE)
                if data == b'':
                    raise ChannelLost('Connection closed by %s' % self.server)
                if data:
                    if down:
                        down.spend(len(data))
                    self.heard = time.monotonic()
                    self.bytes_in += len(data)
                    buf += data
                    self.parse(buf)

    def watch(self, selector, reading, writing):
        """What to wake up for: data, and room for more."""
        import selectors
        events = {self.link.fileno(): 0, self.link.write_fileno(): 0}
        if reading:
            events[self.link.fileno()] |= selectors.EVENT_READ
        if writing:
            events[self.link.write_fileno()] |= selectors.EVENT_WRITE
        known = selector.get_map()
        for fd, wanted in events.items():
            if fd not in known:
                if wanted:
                    selector.register(fd, wanted)
            elif not wanted:
                selector.unregister(fd)
            elif known[fd].events != wanted:
                selector.modify(fd, wanted)

    def listen(self, selector, waits=()):
        """Sleep until something can be done, or one of `waits` seconds that
        is not 0 is over.
        """
        ready = selector.select(min(filter(None, (*waits, SILENCE / 4))))
        for key, _ in ready:
            if key.fd == self.wake_r:
                os.read(self.wake_r, 4096)
        if not ready and self.waiting and \
                time.monotonic() - self.heard > SILENCE:
            raise ChannelLost('No answer from %s for %d seconds'
                              % (self.server, SILENCE))

    def gather(self):
        """Up to about 1 MiB of queued frames as one view; True to stop."""
        pieces, size = [], 0
        with self.changed:
            if self.hurried or self.closing:
                while self.out and size < MIB:
                    kind, rid, body = self.out.popleft()
                    pieces += (FRAME.pack(len(body), kind, rid), body)
                    size += len(body) + FRAME.size
                if not self.out:
                    self.taken()
            done = self.closing and not pieces
        self.bytes_out += size
        return memoryview(b''.join(pieces)), done

    def parse(self, buf):
        """Deliver the whole frames at the front of `buf`."""
        pos = 0
        while len(buf) - pos >= FRAME.size:
            length, kind, rid = FRAME.unpack_from(buf, pos)
            if length > CEILING['frame']:
                raise ChannelLost('%s sent a frame longer than any'
                                  % self.server)
            if len(buf) - pos - FRAME.size < length:
                break
            pos += FRAME.size
            self.deliver(kind, rid, bytes(buf[pos:pos + length]))
            pos += length
        del buf[:pos]

    def deliver(self, kind, rid, body):
        """Put one frame where it is waited for."""
        with self.changed:
            self.hungry = False
            if kind == RECEIVED:
                self.received = Reader(body, 'RECEIVED').u64()
            elif rid in self.answers:
                self.answers[rid].append((kind, body))
                self.queued += FRAME_COST + len(body)
            elif kind == STATEMENT and self.statement is None:
                self.statement = body
            elif kind == ERROR and self.failed is None \
                    and rid not in self.unread:
                # About the connection, or about a request without answer.
                self.failed = refusal(body)
            self.changed.notify_all()


def refusal(body):
    """The exception for an ERROR frame."""
    reader = Reader(body, 'error from the server')
    code = reader.u16()
    text = reader.rest().decode('utf-8', 'replace')
    text = ''.join(c if c.isprintable() else '?' for c in text)
    if code == E_FUNDS:
        text = 'Account balance is not positive; add money and try again'
    if code == E_MISMATCH:
        text = 'The server holds something else than this commit says (%s); ' \
            'if the cache directory is damaged, run --fsck' % text
    return Refused(code, text)


class Statement:
    """What the server says of itself in its first frame."""

    __slots__ = ('identity', 'store', 'serial', 'nonce')

    def __init__(self, channel):
        reader = Reader(channel.wait_statement(), 'server\'s first frame')
        version = reader.u16()
        if version != PROTOCOL:
            raise RemoteError('%s speaks protocol %d, this program %d'
                              % (channel.server, version, PROTOCOL))
        self.identity = reader.take(32)
        self.store = reader.take(16)
        self.serial = reader.u64()
        self.nonce = reader.take(32)
        signature = reader.take(64)
        reader.end()
        signed = (b'tarsnap-server-1\x00' + self.store
                  + U64.pack(self.serial) + channel.link.cert_hash)
        if not verify(self.identity, signature, signed):
            raise RemoteError('%s: its identity does not vouch for the '
                              'certificate it showed; somebody may be in '
                              'between' % channel.server)

    def fingerprint(self):
        return sha256(self.identity)


def channel_check(channel, key):
    """The channel's Statement, if it is the server `key` was made with.

    Nothing has been sent before this, and nothing is sent if it raises.
    """
    statement = Statement(channel)
    if statement.fingerprint() not in key.pins:
        raise RemoteError(
            '%s is not the server this key was made with: its fingerprint is '
            '%s; nothing was sent' % (channel.server,
                                      statement.fingerprint().hex()))
    if statement.store != key.store:
        raise RemoteError('%s holds another store than this key\'s; nothing '
                          'was sent' % channel.server)
    return statement


def auth_post(channel, statement, key, role):
    """Send the proof of one role; the request's id."""
    nonce = os.urandom(32)
    signed = b'tarsnap-auth-1\x00' + struct.pack(
        '>HB16s32sQB', PROTOCOL, channel.link.transport, key.store,
        channel.link.cert_hash, key.machine, role) + statement.nonce + nonce
    return channel.post(
        AUTH, struct.pack('>HQB', PROTOCOL, key.machine, role), nonce,
        sign(key.sign_privs[role], signed))


def auth_answer(channel, rid):
    """What the server says to a proof: (head n, H_n, archives, flags)."""
    reader = Reader(channel.reply(rid)[1], 'answer to AUTH')
    head = (reader.u64(), reader.take(32))
    return head, reader.u64(), reader.u8()


class Remote:
    """The server of a key file, reached again whenever it is lost."""

    def __init__(self, key, roles, server=None, forever=False, noisy=False):
        self.key = key
        self.roles = roles              # ROLE_* to prove, in order
        self.spare = ()                 # of these, what can be done without
        self.proven = set()             # ROLE_* that the channel has
        self.server = server or key.server
        self.forever = forever          # never give up
        self.noisy = noisy              # warn at every hitch
        self.apart = False              # serve a directory in a child
        self.limits = (None, None)      # as Channel has them
        self.reached = False            # at least once
        self.since = 0.0                # when the channel was made
        self.failures = 0               # since a connection was worth it
        self.channel = None
        self.head = (0, b'')            # (n, H_n), the newest seen
        self.archives = 0               # live ones then
        self.read_only = self.charges = False
        self.changed = False            # it took a deletion, or took it back

    def connect(self):
        """An authenticated Channel: the one there is, or a new one.

        Waits longer and longer between tries; RemoteError when it gives up.
        """
        if self.channel and not self.channel.failed:
            return self.channel
        warned = False
        if self.channel:
            if self.fruitful():
                self.failures = 0
            warned = self.failed(self.channel.failed, warned)
        while True:
            try:
                if self.pause():
                    time.sleep(self.pause())
                channel = self.connect_once()
            except (ChannelLost, Refused) as e:
                if isinstance(e, Refused) and e.code != E_BUSY:
                    raise
                warned = self.failed(e, warned)
                continue
            if warned:
                warn('Connection to %s is back' % self.server)
            self.reached = True
            return channel

    def fruitful(self):
        """True if the lost connection was worth it: one that breaks again
        and again, and does nothing, counts like one that cannot be made.
        """
        channel = self.channel
        return channel.bytes_in + channel.bytes_out > FRUITFUL or \
            time.monotonic() - self.since > FRUITFUL_SECONDS

    def failed(self, error, warned):
        """Count a failure; RemoteError if these were enough.  True if it, or
        one before it, was said.
        """
        self.failures += 1
        most = len(WAITS) if self.reached else FIRST_TRIES
        if self.failures >= most and not self.forever:
            raise RemoteError('Too many network failures: %s' % error)
        if self.noisy or (self.pause() >= 30 and not warned):
            warn('%s; trying again' % error)
            return True
        return warned

    def pause(self):
        """Seconds to wait before the next try."""
        return WAITS[min(self.failures, len(WAITS) - 1)]

    def connect_once(self):
        """One try: who the server is, then who we are; RemoteError."""
        self.close()
        channel = Channel(self.server, self.apart, self.limits)
        try:
            statement = channel_check(channel, self.key)
            self.proven = set()
            for role, rid in [
                    (role, auth_post(channel, statement, self.key, role))
                    for role in self.roles]:
                self.prove(channel, role, rid)
        except BaseException:
            channel.close()
            raise
        self.channel, self.since = channel, time.monotonic()
        return channel

    def prove(self, channel, role, rid):
        """Have `role` proven, as request `rid` asked; a spare one may be
        refused: it is frozen, say.
        """
        try:
            self.head, self.archives, flags = auth_answer(channel, rid)
            self.read_only, self.charges = flags & 1, flags & 2
            self.proven.add(role)
        except Refused as e:
            if e.code != E_ROLE or role not in self.spare:
                raise

    def whole(self, frames):
        """All of an answer; RemoteError if it has no end."""
        answers, size = [], 0
        for kind, body in frames:
            size += FRAME_COST + len(body)
            if size > ANSWER_MOST:
                raise RemoteError('The answer of %s has no end' % self.server)
            answers.append((kind, body))
        return answers

    def saw(self, n, head):
        """Commit `n` stands: no server of ours is older from now on."""
        if n > self.head[0]:
            self.head = (n, head)

    def ask(self, kind, *body):
        """All answers to a request that may be repeated, up to its OK."""
        for _ in WAITS:
            channel = self.connect()
            try:
                return self.whole(channel.stream(channel.post(kind, *body)))
            except ChannelLost as e:
                lost = e
        raise RemoteError('Too many network failures: %s' % lost)

    def close(self):
        if self.channel:
            self.channel.close()
            self.channel = None


##############################################################################
# Paths: patterns, and how a path is shown
#
# The rules of --exclude, --include and the operands of -t and -x, compiled to
# expressions over bytes; and the one way any path reaches a terminal.  Knows
# paths only: no file is looked at.
##############################################################################

WILD = re.compile(rb'(?s)\\.|([*?\[])')         # group 1: a live wildcard
UNESCAPE = re.compile(rb'(?s)\\(.)')
SLASHES = re.compile(rb'/(?:\.?/)+')
DOT_SLASH = re.compile(rb'(?:\./+)+(?=.)', re.S)


class Patterns:
    """What --exclude, --include and operands pick.

    `any` is False where there is no pattern at all: callers in a hurry look
    at it once and call nothing.  Exclusion wins over everything; inclusion
    needs one match if there is any include or operand.  With `first` an
    operand with wildcards picks the first path it matches, and all below it,
    but no other.
    """

    def __init__(self, exclude=(), include=(), operands=(), first=False):
        self.any = bool(exclude or include or operands)
        self.excludes = bool(exclude)
        self.includes = bool(include or operands)
        self.names, self.exclude = exclude_compile(exclude)
        self.operands = list(operands)
        self.plain = {}         # literal path -> numbers of its patterns
        self.wild = []          # (expression, number), those with wildcards
        self.missed = set(range(len(operands)))     # operands not matched
        self.first = {} if first else None  # number -> path met, and '/'
        for number, pattern in enumerate(list(operands) + list(include)):
            literal = pattern_literal(pattern)
            if literal is None:
                self.wild.append((pattern_compile(pattern), number))
            else:
                self.plain.setdefault(literal, []).append(number)

    def excluded(self, path):
        """True if --exclude takes `path` out."""
        if not self.excludes:
            return False
        path = path_trim(path)
        if self.names and names_in(self.names, path.split(b'/')):
            return True
        return bool(self.exclude and self.exclude.search(path))

    def included(self, path):
        """True if an include or operand matches, or if there is none.

        Every operand that matches is remembered as met.
        """
        if not self.includes:
            return True
        path = path_trim(path)
        hit = bool(self.plain) and self.literal(path)
        for expression, number in self.wild:
            if hit and number not in self.missed:
                continue
            if self.first is not None and number in self.first:
                hit = hit or path.startswith(self.first[number])
            elif expression.match(path):
                hit = True
                if self.first is not None and number in self.missed:
                    self.first[number] = path + b'/'
                self.missed.discard(number)
        return hit

    def literal(self, path):
        """True if `path` or a directory above it is named literally."""
        hit = False
        while path:
            found = self.plain.get(path)
            if found:
                hit = True
                self.missed.difference_update(found)
            if path.startswith(b'/') and path.rfind(b'/') == 0:
                return bool(self.plain.get(b'/')) or hit
            path = path[:max(path.rfind(b'/'), 0)]
        return hit

    def selected(self, path):
        return not self.excluded(path) and self.included(path)

    def unmatched(self):
        """The operands nothing matched, in their order."""
        return [self.operands[number] for number in sorted(self.missed)]

    def literals(self):
        """The set of paths picked, if no wildcard is among them; or None."""
        return set(self.plain) if self.plain and not self.wild else None


def path_trim(path):
    """`path` without leading './', which means nothing."""
    if path.startswith(b'./'):
        return DOT_SLASH.sub(b'', path, count=1)
    return path


def names_in(names, parts):
    """True if a name of `names` stands somewhere in the path `parts`.

    `names`: number of components -> set of names of that many.
    """
    for count, known in names.items():
        if count == 1:
            if not known.isdisjoint(parts):
                return True
            continue
        for at in range(len(parts) - count + 1):
            if b'/'.join(parts[at:at + count]) in known:
                return True
    return False


def pattern_trim(pattern):
    """Without leading './' and trailing '/', which mean nothing."""
    pattern = path_trim(SLASHES.sub(b'/', pattern))
    if len(pattern) > 1 and pattern.endswith(b'/') \
            and not pattern.endswith(b'\\/'):
        pattern = pattern[:-1]
    return pattern


def pattern_literal(pattern):
    """The path a pattern without wildcards names, or None."""
    pattern = pattern_trim(pattern)
    if any(match.group(1) for match in WILD.finditer(pattern)):
        return None
    return UNESCAPE.sub(rb'\1', pattern)


def pattern_compile(pattern):
    """An expression that matches paths from their start."""
    pattern = pattern_trim(pattern)
    return re.compile(b'(?s)' + glob(pattern))


def exclude_compile(patterns):
    """(names, expression): what --exclude takes out.

    A pattern is tried at the start and after every '/', unless it begins
    with '/' or '*'.  Plain names, most patterns of a long list, are looked
    up instead: see names_in.
    """
    names, forms = {}, []
    for pattern in patterns:
        literal = pattern_literal(pattern)
        if literal and not literal.startswith(b'/'):
            count = literal.count(b'/') + 1
            names.setdefault(count, set()).add(literal)
            continue
        pattern = pattern_trim(pattern)
        anchor = rb'\A' if pattern[:1] in (b'/', b'*') else rb'(?:\A|/)'
        forms.append(anchor + glob(pattern))
    return names, forms and re.compile(b'(?s)' + b'|'.join(forms))


def glob(pattern):
    """Source of an expression for a trimmed glob.

    `*` and `?` match '/' too.  What follows a match must be below it.
    """
    out, pos = [], 0
    while pos < len(pattern):
        byte = pattern[pos:pos + 1]
        pos += 1
        if byte == b'*':
            out.append(b'.*')
            while pattern[pos:pos + 1] == b'*':     # '**' would be slow
                pos += 1
        elif byte == b'?':
            out.append(b'.')
        elif byte == b'[':
            source, pos = glob_class(pattern, pos)
            out.append(source)
        elif byte == b'\\' and pos < len(pattern):
            out.append(re.escape(pattern[pos:pos + 1]))
            pos += 1
        else:
            out.append(b'/+' if byte == b'/' else re.escape(byte))
    if pattern in (b'', b'/'):      # nothing; everything absolute
        return b'(?!)' if not pattern else b'/'
    return b''.join(out) + rb'(?=/|\Z)'


def glob_class(pattern, start):
    """(source, position after it) of the [...] whose inside is at `start`.

    ']' in the first place is itself; without its end '[' is itself too.
    """
    pos, members = start, []
    negated = pattern[pos:pos + 1] in (b'!', b'^')
    pos += negated
    first = True
    while pos < len(pattern) and (first or pattern[pos:pos + 1] != b']'):
        first = False
        low, pos = glob_member(pattern, pos)
        if pattern[pos:pos + 1] == b'-' \
                and pattern[pos + 1:pos + 2] not in (b'', b']'):
            high, pos = glob_member(pattern, pos + 1)
            members += range(low, high + 1)
        else:
            members.append(low)
    if pos >= len(pattern):
        return rb'\[', start
    # Every member stands as \xHH: no byte of it can mean anything else.
    inside = b''.join(b'\\x%02x' % member for member in sorted(set(members)))
    if not inside:
        return (b'.' if negated else b'(?!)'), pos + 1
    return b'[%b%b]' % (b'^' if negated else b'', inside), pos + 1


def glob_member(pattern, pos):
    """(byte value, next position) of one member of a class."""
    if pattern[pos:pos + 1] == b'\\' and pos + 1 < len(pattern):
        pos += 1
    return pattern[pos], pos + 1


# Bytes that may reach a terminal as they are.  What else is valid UTF-8 is
# shown raw too, but for control characters.
UNSAFE = re.compile(rb'[^ -\[\]-~]')
CONTROL = re.compile('[\x00-\x1f\x7f-\x9f\\\\\ud800-\udfff]')
CONTROLS = re.compile(rb'[\0-\x1f\x7f]')
ESCAPES = {'\a': '\\a', '\b': '\\b', '\f': '\\f', '\n': '\\n', '\r': '\\r',
           '\t': '\\t', '\v': '\\v', '\\': '\\\\'}


def path_escape(path):
    """`path` (bytes) as bytes that neither end a line nor drive a terminal."""
    if not UNSAFE.search(path):
        return path
    text = path.decode('utf-8', 'surrogateescape')
    return CONTROL.sub(escape_one, text).encode('utf-8')


def controls_escape(text):
    """`text` (bytes) with its control characters escaped, nothing else."""
    return CONTROLS.sub(lambda match: b'\\%03o' % ord(match.group()), text)


def escape_one(match):
    char = match.group()
    if char in ESCAPES:
        return ESCAPES[char]
    return ''.join('\\%03o' % byte
                   for byte in char.encode('utf-8', 'surrogateescape'))


def say(line, end=b'\n'):
    """Write `line` (bytes) and `end` to stderr; never fails."""
    try:
        sys.stderr.flush()
        raw = getattr(sys.stderr, 'buffer', None)
        if raw is None:
            sys.stderr.write((line + end).decode('utf-8', 'replace'))
        else:
            raw.write(line + end)
            raw.flush()
    except (OSError, ValueError, AttributeError):
        pass


def ask(verb, path):
    """True if whoever sits at descriptor 2 says yes to the question."""
    say(b"%b '%b'? " % (verb, path_escape(path)), b'')
    answer = b''
    while not answer.endswith(b'\n'):
        try:
            byte = os.read(2, 1)
        except OSError as e:
            raise UserError('No answer can be read from standard error: %s'
                            % e.strerror) from None
        if not byte:
            raise UserError('No more answers')
        answer += byte
    return answer[:1] in (b'y', b'Y')


##############################################################################
# Selection: list files, -s, and dates
#
# Lists of names from files, new names by the rules of -s, and what --newer
# lets through.  Compiled once, before any entry is met; knows names and times,
# and reads no file but the lists.
##############################################################################


def list_read(path):
    """The bytes of a list file; `-` is standard input."""
    try:
        if path == '-':
            if sys.stdin is None:
                raise UserError('Cannot read the list of names: standard '
                                'input is closed')
            return sys.stdin.buffer.read()
        with open(path, 'rb') as file:
            return file.read()
    except OSError as e:
        raise UserError('Cannot read list %s: %s'
                        % (path, e.strerror)) from None


def list_names(data, null):
    """The names in a list, one by one: ended by NUL if `null`, else by \\n,
    \\r or both.  Empty ones are no names.
    """
    if b'\0' in data and not null:
        raise UserError('A list of names has NULs in it; if they end names, '
                        '--null must stand before it')
    ends = rb'[^\0]+' if null else rb'[^\r\n]+'
    return (found.group() for found in re.finditer(ends, data))


def list_items(data, null):
    """('path', name) and ('cd', directory) of a list for -c: a line `-C` says
    that the next one is a directory to change to.
    """
    names = list_names(data, null)
    for name in names:
        if name != b'-C' or null:
            yield 'path', name
            continue
        directory = next(names, None)
        if directory is None:
            raise UserError('A list of names ends after -C')
        yield 'cd', directory


# -s: a POSIX basic regular expression becomes one of Python's.  Both work on
# text in which each byte that is not UTF-8 stands for itself, so that `.` is
# a character and what comes back is the same bytes.

BASIC_CLASSES = {
    'alpha': 'a-zA-Z', 'digit': '0-9', 'alnum': 'a-zA-Z0-9',
    'upper': 'A-Z', 'lower': 'a-z', 'space': r' \t\n\r\f\v',
    'blank': r' \t', 'punct': r'!-/:-@\[-`{-~', 'print': ' -~',
    'graph': '!-~', 'cntrl': r'\x00-\x1f\x7f', 'xdigit': '0-9A-Fa-f'}
BASIC_COUNT = re.compile(r'([0-9]{1,4})(,?)([0-9]{0,4})\\}')
RENAME_FLAGS = 'gpsrh'


def path_text(path):
    """A path as text, of any bytes; path_bytes() is its inverse."""
    return path.decode('utf-8', 'surrogateescape')


def path_bytes(text):
    return text.encode('utf-8', 'surrogateescape')


def basic_class(text, pos):
    """(source, position after it) of the [...] whose inside is at `pos`."""
    out, start = ['['], pos
    if text[pos:pos + 1] == '^':
        out.append('^')
        pos += 1
    first = pos
    while pos < len(text) and (text[pos] != ']' or pos == first):
        named = re.compile(r'\[:([a-z]+):\]').match(text, pos)
        if named:
            if named[1] not in BASIC_CLASSES:
                raise UserError('no such class: [:%s:]' % named[1])
            out.append(BASIC_CLASSES[named[1]])
            pos = named.end()
            continue
        # A '-' between two members is a range; nothing else is special.
        plain = text[pos] == '-' and pos > first \
            and text[pos + 1:pos + 2] != ']'
        out.append('-' if plain else re.escape(text[pos]))
        pos += 1
    if pos >= len(text):
        raise UserError('[ without its ]: %s' % text[start - 1:])
    return ''.join(out) + ']', pos + 1


def basic_count(text, pos, counted):
    """(source, position after it) of the count after the \\{ at `pos`."""
    found = BASIC_COUNT.match(text, pos)
    if not found or not counted:
        raise UserError('\\{ is no count: %s' % text[pos - 2:])
    return '{%s%s%s}' % found.groups(), found.end()


def basic_compile(text):
    """A basic regular expression, compiled; UserError if it is none.

    `*` is itself where there is nothing to repeat, `^` and `$` where they
    are not at an end; \\+ \\? \\| are what GNU made of them.
    """
    out, pos, fresh = [], 0, True       # fresh: nothing here to repeat yet
    while pos < len(text):
        char, pos = text[pos], pos + 1
        begins, fresh = fresh, False
        if char == '\\' and pos < len(text):
            char, pos = text[pos], pos + 1
            if char in '()|':
                out.append(char)
                fresh = char != ')'
            elif char == '{':
                source, pos = basic_count(text, pos, not begins)
                out.append(source)
            elif char in '+?' and not begins:
                out.append(char)
            elif char in '123456789':
                out.append('(?:\\%s)' % char)
            else:
                out.append(re.escape(char))
        elif char == '[':
            source, pos = basic_class(text, pos)
            out.append(source)
        elif char == '*' and not begins:
            # A second one changes nothing, and Python refuses it.
            out.append('' if out[-1] == '*' else '*')
        elif char == '^' and begins:
            out.append('^')
            fresh = True
        elif char == '$' and text[pos:pos + 2] in ('', r'\)', r'\|'):
            out.append(r'\Z')
        else:
            out.append('.' if char == '.' else re.escape(char))
    try:
        return re.compile('(?s)' + ''.join(out))
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(str(e)) from None


class Rule:
    """One -s /old/new/flags."""

    __slots__ = ('text', 'old', 'new', 'flags')

    def __init__(self, text):
        """`text` as it was given, with any character for '/'."""
        self.text = text
        slash = text[:1]
        part = r'((?:[^\\%s]|\\.)*)' % re.escape(slash)
        found = slash not in ('', '\\') and re.fullmatch(
            '%s%s%s%s%s(.*)' % (re.escape(slash), part, re.escape(slash),
                                part, re.escape(slash)), text, re.S)
        if not found:
            raise UserError('Not /old/new/flags: %s' % text)
        old, new, self.flags = found.groups()
        if self.flags.strip(RENAME_FLAGS):
            raise UserError('%s: flags are %s' % (
                text, ', '.join(RENAME_FLAGS)))
        try:
            self.old = basic_compile(old.replace('\\' + slash, slash))
            self.new = self.replacement(new)
        except UserError as e:
            raise UserError('%s: %s' % (text, e)) from None

    def replacement(self, text):
        """Pieces of the new text: a string, or the number of a group."""
        pieces = []
        for found in re.finditer(r'\\([1-9])|\\(.)|(~)|([^\\~]+)|\\', text,
                                 re.S):
            if found[1] and int(found[1]) > self.old.groups:
                raise UserError('no group \\%s' % found[1])
            pieces.append(int(found[1]) if found[1] else 0 if found[3]
                          else found[2] or found[4] or '\\')
        return pieces

    def apply(self, text):
        """(text, True if the rule matched it)."""
        def fill(found):
            return ''.join([piece if isinstance(piece, str)
                            else found[piece] or '' for piece in self.new])

        text, count = self.old.subn(fill, text, 0 if 'g' in self.flags else 1)
        return text, bool(count)


class Rename:
    """What all -s together make of a name."""

    def __init__(self, rules):
        self.rules = rules
        self.links = [rule for rule in rules if 's' in rule.flags]
        self.digest = self.links and sha256(b'\0'.join(
            path_bytes(rule.text) for rule in self.links))

    def __call__(self, path):
        """The new name, b'' if nothing is left of it."""
        return self.apply(path, self.rules)

    def target(self, path):
        """What a symbolic link to `path` shall point at."""
        return self.apply(path, self.links) or path

    @staticmethod
    def apply(path, rules):
        """Rules in their order, up to the first that matches without g."""
        text = path_text(path)
        for rule in rules:
            fresh, matched = rule.apply(text)
            if not matched:
                continue
            if 'p' in rule.flags:
                say(path_escape(path_bytes(text)) + b' >> '
                    + path_escape(path_bytes(fresh)))
            text = fresh
            if 'g' not in rule.flags:
                break
        return path_bytes(text)


def target_edit(entry, opt):
    """What -s makes of the target of a symbolic link."""
    if opt.rename and entry.kind == SYMLINK:
        entry.target = opt.rename.target(entry.target)


# Dates as people write them to tar and date(1).

DATE_MONTHS = ('jan feb mar apr may jun jul aug sep oct nov dec').split()
DATE_DAYS = ('mon tue wed thu fri sat sun').split()
DATE_ZONES = {'utc': 0, 'gmt': 0, 'ut': 0, 'z': 0, 'wet': 0, 'west': 1,
              'bst': 1, 'cet': 1, 'cest': 2, 'eet': 2, 'eest': 3, 'msk': 3,
              'jst': 9, 'est': -5, 'edt': -4, 'cst': -6, 'cdt': -5,
              'mst': -7, 'mdt': -6, 'pst': -8, 'pdt': -7}
DATE_UNITS = {'sec': (0, 0, 1), 'min': (0, 0, 60), 'hour': (0, 0, 3600),
              'day': (0, 1, 0), 'week': (0, 7, 0), 'fortnight': (0, 14, 0),
              'month': (1, 0, 0), 'year': (12, 0, 0)}
DATE_COUNTS = {'a': 1, 'an': 1, 'this': 0, 'last': -1, 'next': 1}
DATE_WORDS = {'now': {}, 'today': {}, 'yesterday': {'days': -1},
              'tomorrow': {'days': 1},
              'midnight': {'time': (0, 0, 0)}, 'noon': {'time': (12, 0, 0)}}
MONTH = r'(?P<month>jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)' \
    r'(?:uary|ruary|ch|il|e|y|ust|t|tember|ober|ember)?\.?(?![a-z])'
DATE_TOKENS = (     # what a piece is, its expression
    ('epoch', r'@(-?\d{1,18})(?:\.(\d{1,9})\d*)?(?!\d)'),
    ('date', r'(?P<y>\d{4})-(?P<m>\d\d?)-(?P<d>\d\d?)(?:T(?=\d)|(?!\d))'),
    ('date', r'(?P<y>\d{4})(?P<m>\d\d)(?P<d>\d\d)(?:T(?=\d)|(?![\d:]))'),
    ('date', r'(?P<y>\d{4})/(?P<m>\d\d?)/(?P<d>\d\d?)(?!\d)'),
    ('date', r'(?P<m>\d\d?)/(?P<d>\d\d?)(?:/(?P<y>\d{4}|\d\d))?(?!\d)'),
    ('date', r'(?P<d>\d\d?)[- ]?' + MONTH
     + r'(?:[-, ]\s*(?P<y>\d{4})(?!\d|:))?'),
    ('date', MONTH + r'[- ]?(?P<d>\d\d?)(?:st|nd|rd|th)?(?![\d:])'
     r'(?:[-, ]\s*(?P<y>\d{4})(?!\d|:))?'),
    ('time', r'(\d\d?):(\d\d)(?::(\d\d)(?:[.,](\d{1,9})\d*)?)?(?!\d)'
     r'\s*(?:([ap])\.?m\.?(?![a-z]))?'),
    ('time', r'(?<=T)(\d\d)(\d\d)(\d\d)?()()(?!\d)'),
    ('time', r'(\d\d?)()()()\s*([ap])\.?m\.?(?![a-z])'),
    ('relative', r'([+-]?)\s*(?:(\d{1,9})|(an?|last|next|this)(?![a-z]))?\s*'
     r'(sec|min|hour|day|week|fortnight|month|year)'
     r'(?:ond|ute)?s?(?![a-z])(\s+ago(?![a-z]))?'),
    ('weekday', r'(?:(last|next|this)\s+)?(mon|tue|wed|thu|fri|sat|sun)'
     r'(?:day|sday|nesday|rsday|urday)?\.?(?![a-z])'),
    ('offset', r'(?:utc|gmt)?([+-])(\d\d):?(\d\d)?(?!\d)'),
    ('zone', r'(%s)(?![a-z])' % '|'.join(sorted(DATE_ZONES, reverse=True))),
    ('word', r'(%s)(?![a-z])' % '|'.join(DATE_WORDS)),
)


class DateText:
    """A date in words, taken apart piece by piece."""

    def __init__(self, text, now):
        """`now` in ns since 1970.  UserError if the text is no date."""
        self.now = now
        self.epoch = self.date = self.time = self.zone = self.weekday = None
        self.nanos = None
        self.months = self.days = self.seconds = 0
        pos, text = 0, text.strip()
        while pos < len(text):
            pos = self.token(text, pos)
        if not text:
            raise ValueError

    def token(self, text, pos):
        """Take one piece; the position after it and blanks or commas."""
        for name, source in DATE_TOKENS:
            found = re.compile(source, re.I | re.A).match(text, pos)
            if found:
                getattr(self, 'take_' + name)(found)
                return re.compile(r'[\s,]*').match(text, found.end()).end()
        raise ValueError

    def once(self, field, value):
        """Set what may be said only once."""
        if getattr(self, field) is not None:
            raise ValueError
        setattr(self, field, value)

    def take_epoch(self, found):
        nanos = int((found[2] or '').ljust(9, '0'))
        self.once('epoch', int(found[1]) * BILLION
                  + (-nanos if found[1].startswith('-') else nanos))

    def take_date(self, found):
        parts = found.groupdict()
        month = DATE_MONTHS.index(parts['month'].lower()) + 1 \
            if parts.get('month') else int(parts['m'])
        year = parts['y'] and int(parts['y'])
        if year is not None and len(parts['y']) == 2:
            year += 1900 if year > 68 else 2000
        self.once('date', (year, month, int(parts['d'])))

    def take_time(self, found):
        hour, minute, second = (int(found[at] or 0) for at in (1, 2, 3))
        half = (found[5] or '').lower()
        if half:
            if not 1 <= hour <= 12:
                raise ValueError
            hour = hour % 12 + (12 if half == 'p' else 0)
        if hour > 23 or minute > 59 or second > 60:
            raise ValueError
        self.once('time', (hour, minute, second))
        self.nanos = int((found[4] or '').ljust(9, '0'))

    def take_relative(self, found):
        count = int(found[2]) if found[2] else DATE_COUNTS[
            (found[3] or 'a').lower()]
        if (found[1] == '-') != bool(found[5]):
            count = -count
        months, days, seconds = DATE_UNITS[found[4].lower()]
        self.months += count * months
        self.days += count * days
        self.seconds += count * seconds

    def take_weekday(self, found):
        count = DATE_COUNTS[(found[1] or 'this').lower()]
        self.once('weekday', (count, DATE_DAYS.index(found[2].lower())))

    def take_offset(self, found):
        if self.time is None:
            raise ValueError
        seconds = int(found[2]) * 3600 + int(found[3] or 0) * 60
        self.once('zone', -seconds if found[1] == '-' else seconds)

    def take_zone(self, found):
        self.once('zone', DATE_ZONES[found[1].lower()] * 3600)

    def take_word(self, found):
        word = DATE_WORDS[found[1].lower()]
        self.days += word.get('days', 0)
        if 'time' in word:
            self.once('time', word['time'])

    def value(self):
        """ns since 1970; ValueError or OverflowError if there is no such
        day.
        """
        if self.epoch is not None:
            if self.date or self.time or self.weekday or self.zone:
                raise ValueError
            self.now = self.epoch
        import calendar
        now, nanos = divmod(self.now, BILLION)
        today = time.localtime(now) if self.zone is None \
            else time.gmtime(now + self.zone)
        year, month, day = self.date or today[:3]
        year = today[0] if year is None else year
        if not 1 <= month <= 12 \
                or not 1 <= day <= calendar.monthrange(year, month)[1]:
            raise ValueError
        if self.weekday:
            count, wanted = self.weekday
            ahead = (wanted - calendar.weekday(year, month, day)) % 7
            day += ahead + 7 * (count - (count > 0 and ahead > 0))
        clock = self.time
        if clock is not None:
            nanos = self.nanos or 0
        elif self.date or self.weekday:
            clock, nanos = (0, 0, 0), 0
        else:
            clock = today[3:6]
        year, month = divmod(year * 12 + month - 1 + self.months, 12)
        parts = (year, month + 1, day + self.days, *clock, 0, 0, -1)
        seconds = int(time.mktime(parts)) if self.zone is None \
            else calendar.timegm(parts) - self.zone
        return (seconds + self.seconds) * BILLION + nanos


def date_parse(text, now=None):
    """ns since 1970 of a date as tar takes it: `2026-11-23 04:05`, `@UNIX`,
    `yesterday`, `now - 1 week`, `3 days ago`, `23 Nov 2026`, `last monday`.
    """
    try:
        return DateText(text, time.time_ns() if now is None else now).value()
    except (ValueError, OverflowError, OSError):
        raise UserError('Not a date: "%s"' % text) from None


class Newer:
    """What --newer and its like let through: strictly later, in ns."""

    def __init__(self, limits):
        """`limits` are ('ctime' | 'mtime', ns); all must be passed."""
        self.ctime = max((at for kind, at in limits if kind == 'ctime'),
                         default=None)
        self.mtime = max((at for kind, at in limits if kind == 'mtime'),
                         default=None)
        self.entry = max(at for _, at in limits)

    def __call__(self, entry):
        """True for a stored entry, of which only the mtime is known."""
        return entry.mtime > self.entry

    def status(self, st):
        """True for what lstat gave."""
        return (self.ctime is None or st.st_ctime_ns > self.ctime) \
            and (self.mtime is None or st.st_mtime_ns > self.mtime)


##############################################################################
# Lines: how an entry is shown
#
# What other programs parse, to the byte: the long line of -tv, dates, records
# ended by newline or NUL, and JSON.  Knows entries, not where they are from.
##############################################################################

ACLS = (b'system.posix_acl_access', b'system.posix_acl_default')
HALF_YEAR = 365 * 86400 // 2    # seconds; older dates show their year
MONTHS = ('Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec').split()
FLUSH_SECONDS = 1.0
FLUSH_BYTES = 64 * KIB


class Output:
    """Records to a descriptor.

    Flushed one by one on a terminal, else at the latest after a second:
    100 000 flushes would take longer than the work.
    """

    def __init__(self, fd, end=b'\n'):
        self.fd = fd
        self.end = end
        self.tty = os.isatty(fd)
        self.lines = []
        self.size = 0
        self.flushed = time.monotonic()

    def put(self, line):
        """One record, without its end."""
        self.lines.append(line)
        self.size += len(line)
        if self.tty or self.size >= FLUSH_BYTES:
            self.flush()

    def tick(self):
        """Called now and then, so that what is ready is seen."""
        if time.monotonic() - self.flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self):
        data = b''.join([line + self.end for line in self.lines])
        self.lines, self.size = [], 0
        self.flushed = time.monotonic()
        try:
            write_all(self.fd, data)
        except OSError as e:
            raise stdout_error(e) from None


# JSON: one object a line, all of it ASCII, so that no locale and no terminal
# can spoil it.


def json_line(fields):
    """A dict as a line of JSON (bytes), without its end.

    Names are given as bytes, or as lists of bytes.  One that is not UTF-8
    has its bad bytes replaced by U+FFFD, and stands under its key and
    `_b64` in base64 too.
    """
    import json
    return json.dumps(json_plain(fields)).encode()


def json_plain(fields):
    """`fields` with its names as text."""
    out = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            out[key] = json_plain(value)
        elif isinstance(value, bytes):
            out[key], exact = json_name(value)
            if exact:
                out[key + '_b64'] = exact
        elif isinstance(value, list) and value \
                and isinstance(value[0], bytes):
            pairs = [json_name(name) for name in value]
            out[key] = [text for text, _ in pairs]
            if any(exact for _, exact in pairs):
                out[key + '_b64'] = [base64.b64encode(name).decode()
                                     for name in value]
        else:
            out[key] = value
    return out


def json_name(name):
    """(text, base64 of what it could not hold exactly or '')."""
    try:
        return name.decode(), ''
    except UnicodeDecodeError:
        return (name.decode('utf-8', 'replace'),
                base64.b64encode(name).decode())


def json_time(nanos):
    """RFC 3339 in UTC with nanoseconds; '@SECONDS.NANOS' where years end."""
    seconds, nanos = divmod(nanos, BILLION)
    try:
        when = time.gmtime(seconds)
    except (OverflowError, ValueError, OSError):
        when = (0,)
    if not 0 < when[0] < 10000:
        return '@%d.%09d' % (seconds, nanos)
    return '%04d-%02d-%02dT%02d:%02d:%02d' % when[:6] + '.%09dZ' % nanos


KIND_WORDS = {FILE: 'file', DIRECTORY: 'directory', SYMLINK: 'symlink',
              FIFO: 'fifo', CHARDEV: 'chardev', BLOCKDEV: 'blockdev'}


def json_entry(entry, path, first=None):
    """What JSON says of an entry, as json_line wants it."""
    fields = {
        'type': 'entry', 'path': path, 'kind': KIND_WORDS[entry.kind],
        'mode': '%04o' % entry.mode, 'uid': entry.uid, 'gid': entry.gid,
        'user': entry.uname, 'group': entry.gname, 'size': entry.size,
        'mtime': json_time(entry.mtime)}
    if entry.atime is not None:
        fields['atime'] = json_time(entry.atime)
    if entry.kind == SYMLINK:
        fields['target'] = entry.target
    elif entry.kind in (CHARDEV, BLOCKDEV):
        fields['device'] = list(entry.device)
    if first:
        fields['link'] = first
    if entry.xattrs:
        fields['xattrs'] = [name for name, _ in entry.xattrs]
    return fields


class JsonErrors:
    """Takes the place of sys.stderr: each line becomes a JSON object."""

    def __init__(self, stream):
        self.stream = stream
        self.text = ''              # of a line that has not ended

    def write(self, text):
        *lines, self.text = (self.text + text).split('\n')
        for line in lines:
            if line.startswith(warn.program + ': '):
                line = line[len(warn.program + ': '):]
            self.put_json({'type': 'message', 'message': os.fsencode(line)})

    def put_json(self, fields):
        """Write an object of more than words."""
        self.stream.write(json_line(fields).decode() + '\n')

    def flush(self):
        self.stream.flush()


# The long line.


def date_text(seconds):
    """YYYY-MM-DD HH:MM:SS in this process's time zone."""
    try:
        when = time.localtime(seconds)
    except (OverflowError, ValueError, OSError):
        return b'%d' % seconds
    return ('%04d-%02d-%02d %02d:%02d:%02d' % when[:6]).encode()


MODE_TEXTS = {}             # (letter, mode) -> the ten characters


def mode_text(entry, first):
    """Ten characters of type and permissions, and one for an ACL."""
    key = (ord('h') if first else entry.kind, entry.mode)
    text = MODE_TEXTS.get(key)
    if text is None:
        text = MODE_TEXTS[key] = chr(key[0]).encode() + stat.filemode(
            stat.S_IFREG | entry.mode)[1:].encode()
    acl = entry.xattrs and any(name in ACLS for name, _ in entry.xattrs)
    return text + (b'+' if acl else b' ')


def say_json(fields):
    """An object to stderr, where --json made that take some."""
    put = getattr(sys.stderr, 'put_json', None)
    if put:
        try:
            put(fields)
        except (OSError, ValueError):
            pass


class LongLines:
    """The lines of -tv; columns grow and stay grown."""

    def __init__(self, opt):
        self.opt = opt
        self.escape = (lambda path: path) if opt.null_output else path_escape
        self.user_width = 6     # of the user column; only ever grows
        self.rest_width = 13    # of group and size together, likewise
        self.now = time.time()
        self.dates = {}         # minute or second -> text

    def line(self, entry, path, first=None):
        """One long line.  `first`: the name this one is a hard link to."""
        numeric = self.opt.numeric_owner
        user = self.escape(entry.uname) if entry.uname and not numeric \
            else b'%d' % entry.uid
        group = self.escape(entry.gname) if entry.gname and not numeric \
            else b'%d' % entry.gid
        if entry.kind in (CHARDEV, BLOCKDEV):
            size = b'%d,%d' % entry.device
        else:
            size = b'%d' % (0 if first else entry.size)
        name = self.escape(path)
        if entry.kind == DIRECTORY:
            name += b'/'
        if first:
            name += b' link to ' + self.escape(first)
        elif entry.kind == SYMLINK:
            name += b' -> ' + self.escape(entry.target)
        mode = mode_text(entry, first)
        date = self.date(entry.mtime // BILLION)
        if self.opt.null_output:
            return b'\0\0'.join((mode.rstrip(), b'0', user, group, size, date,
                                 name))
        self.user_width = max(self.user_width, len(user))
        self.rest_width = max(self.rest_width, len(group) + 1 + len(size))
        return b'%b 0 %b %b%b %b %b' % (
            mode, user.ljust(self.user_width), group,
            size.rjust(self.rest_width - len(group)), date, name)

    def date(self, seconds):
        """The date column; files of one minute share it."""
        key = seconds if self.opt.iso_dates else seconds // 60
        text = self.dates.get(key)
        if text is None:
            if len(self.dates) > 10000:
                self.dates.clear()
            text = self.dates[key] = self.date_make(seconds)
        return text

    def date_make(self, seconds):
        if self.opt.iso_dates:
            return date_text(seconds)
        try:
            when = time.localtime(seconds)
        except (OverflowError, ValueError, OSError):
            return b'%d' % seconds
        head = '%s %2d' % (MONTHS[when.tm_mon - 1], when.tm_mday)
        if abs(self.now - seconds) > HALF_YEAR:
            return ('%s  %d' % (head, when.tm_year)).encode()
        return ('%s %02d:%02d' % (head, when.tm_hour, when.tm_min)).encode()


##############################################################################
# Progress: how far a run is, and what signals ask of it
#
# Counts for --progress-bytes, --progress, --totals and SIGUSR1, and keeps what
# other signals asked for until the run comes to a place where it can be done.
# Writes standard error only.
##############################################################################

ENTRY_SIZE = 512            # bytes an entry counts besides its content
BAR_SECONDS = 0.2           # between two states of the bar
BAR_RATE = 10               # seconds over which its rate is an average
ASKED = {'SIGUSR1': 'report_asked', 'SIGINFO': 'report_asked',
         'SIGUSR2': 'checkpoint_asked', 'SIGQUIT': 'stop_asked'}


def humanize(number):
    """`number` bytes as the original shows them: truncated, SI units."""
    if number < 1000:
        return '%d B' % number
    for letter in 'kMGTPE':
        if number < 10000:
            return '%d.%d %sB' % (number // 1000, number // 100 % 10, letter)
        if number < 1000000 or letter == 'E':
            return '%d %sB' % (number // 1000, letter)
        number //= 1000
    raise AssertionError


class Bar:
    """--progress: the last line of a terminal.  Stands before standard error,
    so that other lines do not run into it.
    """

    def __init__(self, stream):
        self.stream = stream
        self.drawn = False
        self.next = 0.0             # not drawn again before
        self.past = collections.deque()     # (time, bytes), BAR_RATE long

    def write(self, text):
        self.clear()
        return self.stream.write(text)

    def clear(self):
        if self.drawn:
            self.drawn = False
            self.put('\r\x1b[K')

    def put(self, text):
        """On a terminal that may be gone by now."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            pass

    @property
    def buffer(self):
        self.clear()
        self.stream.flush()
        return self.stream.buffer

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def draw(self, now, entries, done, whole):
        """`done` bytes of `whole`, which is 0 where nobody knows."""
        self.next = now + BAR_SECONDS
        self.past.append((now, done))
        while self.past[0][0] < now - BAR_RATE:
            self.past.popleft()
        seconds, size = now - self.past[0][0], done - self.past[0][1]
        rate = size / seconds if seconds else 0
        words = ['%d entries' % entries, humanize(done)]
        if done < whole:
            words[1:] = ['%s of %s' % (humanize(done), humanize(whole)),
                         '%d %%' % (100 * done // whole)]
        if rate:
            words.append('%s/s' % humanize(int(rate)))
        if rate and done < whole:
            left = int((whole - done) / rate)
            words.append('%d:%02d:%02d left' % (left // 3600, left // 60 % 60,
                                                left % 60))
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except OSError:
            columns = 0
        self.put('\r%s\x1b[K' % ', '.join(words)[:(columns or 80) - 1])
        self.drawn = True


class Progress:
    """What a run of -c or -x has done, and what it was asked to do."""

    def __init__(self, opt, verb):
        self.opt = opt
        self.verb = verb                # what it does with an entry
        self.report_asked = False
        self.checkpoint_asked = False
        self.stop_asked = False
        self.whole = 0                  # bytes to come to, 0: not known
        self.bar = None
        self.reset()

    def reset(self):
        """Nothing is done."""
        self.entries = 0                # done
        self.bytes = 0                  # ENTRY_SIZE for each, and content
        self.reported = 0               # bytes at the last report
        self.path = None                # of the open entry, bytes
        self.doing = self.verb
        self.size = self.at = 0         # its bytes, and those done

    def start(self, whole=0):
        """Listen to signals; draw the bar if there is a place for it."""
        import signal
        self.whole = whole
        for name, field in ASKED.items():
            # What only -c can do is ignored elsewhere, as in every mode.
            if hasattr(signal, name) and (field == 'report_asked'
                                          or self.opt.letter == 'c'):
                signal.signal(getattr(signal, name),
                              lambda *_, field=field: setattr(self, field,
                                                              True))
        if self.opt.progress and not self.opt.json and sys.stderr and \
                sys.stderr.isatty() and \
                os.environ.get('TERM', 'dumb') != 'dumb':
            self.bar = sys.stderr = Bar(sys.stderr)

    def begin(self, path, size=0, doing=''):
        """Entry `path` of `size` bytes is taken up."""
        self.path, self.size, self.at = path, size, 0
        self.doing = doing or self.verb
        every = self.opt.progress_bytes
        if every and self.bytes - self.reported > every:
            self.report()
        self.step(0)

    def step(self, count):
        """So many more bytes of the open entry are done."""
        self.at += count
        if self.report_asked:
            self.report()
        if self.bar:
            now = time.monotonic()
            if now >= self.bar.next:
                self.bar.draw(now, self.entries, self.bytes + self.at,
                              self.whole)

    def end(self, size=None):
        """The open entry is done, and had `size` bytes if not as said."""
        self.add(1, self.size if size is None else size)
        self.path, self.at = None, 0

    def add(self, entries, size):
        """So many entries, of `size` bytes, are done at once."""
        self.entries += entries
        self.bytes += size + ENTRY_SIZE * entries

    def number(self, size):
        return humanize(size) if self.opt.humanize_numbers else '%d' % size

    def report(self):
        """The lines that SIGUSR1 asks for."""
        self.report_asked = False
        if self.bytes + self.at:
            self.processed(self.bytes + self.at)
        if self.path is not None and not self.opt.json:
            of = ' (%s / %s bytes)' % (self.number(self.at), self.number(
                self.size)) if self.size else ''
            note('%s %s%s\n' % (self.doing, one_line(show(self.path)), of))

    def processed(self, size):
        self.reported = size
        if self.opt.json:
            fields = {'type': 'progress', 'entries': self.entries,
                      'bytes': size}
            if self.path is not None:
                fields.update(path=self.path, done=self.at, size=self.size)
            say_json(fields)
            return
        note('Processed %d entries, %s%s\n' % (
            self.entries, self.number(size),
            '' if self.opt.humanize_numbers else ' bytes'))

    def finish(self):
        """The last line of --progress-bytes."""
        self.close()
        if self.opt.progress_bytes:
            self.processed(self.bytes)

    def close(self):
        """The bar goes."""
        if self.bar:
            self.bar.clear()
            sys.stderr = self.bar.stream
            self.bar = None


class QuitKey:
    """Has Ctrl-Q send SIGQUIT while this run has the terminal."""

    def __init__(self):
        self.fd = self.saved = None

    def take(self):
        """Change the terminal, if there is one and we are in front."""
        import signal
        import termios
        try:
            self.fd = os.open('/dev/tty', os.O_RDWR | os.O_CLOEXEC)
            if os.tcgetpgrp(self.fd) != os.getpgrp():
                return              # changing it would stop us
            modes = termios.tcgetattr(self.fd)
            modes[0] &= ~termios.IXON       # or Ctrl-Q would mean "go on"
            modes[6][termios.VQUIT] = b'\x11'
            self.saved = termios.tcgetattr(self.fd)
            termios.tcsetattr(self.fd, termios.TCSANOW, modes)
        except (OSError, termios.error):
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self.die)

    def close(self):
        """Leave the terminal as it was, unless it is another's by now."""
        import termios
        if self.fd is None:
            return
        try:
            if self.saved and os.tcgetpgrp(self.fd) == os.getpgrp():
                termios.tcsetattr(self.fd, termios.TCSANOW, self.saved)
        except (OSError, termios.error):
            pass
        os.close(self.fd)
        self.fd = None

    def die(self, number, _):
        """As the signal does by itself, but with the terminal restored."""
        import signal
        self.close()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


##############################################################################
# History: what the server says happened, checked
#
# The chain of signed commits is what a server cannot forge: hiding, reviving
# or reordering archives shows to whoever has seen a later head.  Asks the
# server and believes nothing; owns no state.
##############################################################################


class Change:
    """One verified commit with the lists that go with it."""

    __slots__ = ('commit', 'raw', 'hash', 'time', 'added', 'removed')

    def __init__(self, raw, received, key):
        self.raw = raw
        self.hash = sha256(raw)
        self.time = received        # seconds, the server's clock
        self.commit = commit_unpack(raw, key)
        self.added = []             # (name, class, stored length), put order
        self.removed = []           # names


ADDED_ROW = struct.Struct('>32scI')
ARCHIVE_ROW = struct.Struct('>32s32s16sBQ')


def names_join(names):
    """The body of a request that lists names."""
    return U16.pack(len(names)) + b''.join(names)


def names_split(data):
    """The names in a byte string of nothing else."""
    return [bytes(data[i:i + 32]) for i in range(0, len(data), 32)]


def counted(names):
    """(count, SHA-256) of a sequence of names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name)
    return len(names), digest.digest()


def rows_unpack(body, form, what):
    """The rows of form `form` in a counted list."""
    reader = Reader(body, what)
    count = reader.u16()
    if count > CEILING['names'] or count * form.size != reader.left():
        raise CorruptError('%s: malformed list from the server' % what)
    return [reader.unpack(form) for _ in range(count)]


NAME_ROW = struct.Struct('>32s')


def history_changes(remote, base, lists=True):
    """Every Change since `base` (n, H_n), each verified before it comes out.

    With `lists` the names put and deleted come too and are compared with the
    digests in the commit.  A server whose history does not continue `base`
    is a CorruptError.  Needs any role.  A lost connection is made again.
    """
    while True:
        try:
            for change in history_once(remote, base, lists):
                base = (change.commit.n, change.hash)
                remote.saw(*base)
                yield change
            return
        except ChannelLost:
            continue


def history_once(remote, base, lists):
    """The same over one connection."""
    change, n, head = None, *base
    for kind, body in history_frames(remote, base, lists):
        if kind == COMMIT_OBJECT:
            if change:
                yield change_check(change, lists)
            reader = Reader(body, 'COMMIT_OBJECT')
            when = reader.u64()
            change = Change(reader.rest(), when, remote.key)
            if change.commit.n != n + 1 or change.commit.previous != head:
                raise CorruptError(
                    'The server\'s history does not continue at commit %d: '
                    'it was rolled back, forked, or hides something' % n)
            n, head = n + 1, change.hash
        elif change is None:
            raise CorruptError('CHANGES: lists without a commit')
        elif kind == ADDED:
            change.added += rows_unpack(body, ADDED_ROW, 'ADDED')
        elif kind == REMOVED:
            change.removed += [row[0] for row in
                               rows_unpack(body, NAME_ROW, 'REMOVED')]
        if lists and kind in (ADDED, REMOVED):
            change_endless(change)
    if change:
        yield change_check(change, lists)


def history_frames(remote, base, lists):
    """The answers to CHANGES; a refusal put in the words of this section."""
    channel = remote.connect()
    try:
        rid = channel.post(CHANGES, U64.pack(base[0]), base[1],
                           U8.pack(lists))
        yield from channel.stream(rid)
    except Refused as e:
        if e.code in (E_RESYNC, E_CONFLICT):
            raise CorruptError(
                'The server does not know commit %d as this machine has '
                'seen it (%s): its state is older or another one (%s)'
                % (base[0], base[1].hex()[:16], e)) from None
        raise


def history_at(remote, n):
    """Hash of commit n as the server has it, None if it has none."""
    while True:
        try:
            for kind, body in history_frames(remote, (n - 1, bytes(32)),
                                             False):
                if kind == COMMIT_OBJECT:
                    return sha256(body[8:])
            return None
        except ChannelLost:
            continue


def change_endless(change):
    """CorruptError once more names came than the commit counts."""
    commit = change.commit
    removed = 0 if commit.kind == KIND_NUKE else commit.deleted[0]
    for many, most, what in ((change.added, commit.puts[0], 'put'),
                             (change.removed, removed, 'deleted')):
        if len(many) > most:
            raise CorruptError('commit %d: the server left out or changed '
                               'names that were %s' % (commit.n, what))


def change_check(change, lists):
    """`change`, its lists compared with what its signer counted."""
    commit = change.commit
    if lists:
        if counted([row[0] for row in change.added]) != commit.puts:
            raise CorruptError('commit %d: the server left out or changed '
                               'names that were put' % commit.n)
        if commit.kind != KIND_NUKE and \
                counted(sorted(change.removed)) != commit.deleted:
            raise CorruptError('commit %d: the server left out or changed '
                               'names that were deleted' % commit.n)
    return change


def archives_apply(archives, change):
    """Bring the map id -> (record, lineage, state, time) up to `change`.

    CorruptError if the commit's digest of all live archives then differs.
    """
    commit = change.commit
    if commit.kind == KIND_NUKE:
        archives.clear()
    for archive, record in commit.unlinked:
        if archives.pop(archive, (None,))[0] != record:
            raise CorruptError('commit %d unlinks an archive that is not '
                               'there' % commit.n)
    for archive, record, lineage, state in commit.linked:
        archives[archive] = (record, lineage, state, change.time)
    if live_digest(archives) != commit.live:
        raise CorruptError('commit %d: its archives are not the ones it '
                           'signed' % commit.n)


def history_follow(remote, seen, head):
    """Check that the server's `head` (n, H_n) continues `seen`."""
    if head[0] < seen[0]:
        raise CorruptError(
            'The server shows commit %d, but commit %d was seen before: it '
            'was rolled back or hides the newest archives' % (head[0],
                                                              seen[0]))
    last = seen
    for change in history_changes(remote, seen, lists=False):
        last = (change.commit.n, change.hash)
        if change.commit.n == head[0]:
            break
    if last != head:
        raise CorruptError('The server\'s head %d:%s does not continue '
                           'commit %d' % (head[0], head[1].hex()[:16],
                                          seen[0]))


HEAD_TEXT = re.compile(r'(\d{1,19}):([0-9a-f]{16})$')


def head_text(head):
    """What --print-head prints and --expect-head takes."""
    return '%d:%s' % (head[0], head[1].hex()[:16])


def history_expect(remote, text, head):
    """Refuse a server that is older than, or another than, `text`."""
    found = HEAD_TEXT.match(text)
    if not found:
        raise UserError('--expect-head wants N:HEX16, not "%s"' % text)
    n, prefix = int(found[1]), found[2]
    if n > head[0]:
        raise CorruptError(
            'The server\'s newest state is commit %d, but --expect-head names '
            '%d: it hides the newest archives or was rolled back'
            % (head[0], n))
    if n == 0:
        found = (0, remote.key.genesis())
    else:
        found = (n, history_at(remote, n))
    if not found[1] or found[1].hex()[:16] != prefix:
        raise CorruptError('Commit %d of the server is not the one '
                           '--expect-head names: its history was forked' % n)
    history_follow(remote, found, head)


def history_live(remote, opt):
    """The live archives: id -> (record, lineage, state, receive time).

    The list is what the newest commit signed; that commit continues what the
    cache directory, if there is one, has seen, and --expect-head if given.
    --accept-rollback takes what the server still has.  Needs the read or the
    delete role.
    """
    answers = remote.ask(LIST, U16.pack(0))
    archives, commit, head = {}, None, (0, remote.key.genesis())
    for kind, body in answers:
        if kind == COMMIT_OBJECT:
            commit = commit_unpack(body[8:], remote.key)
            head = (commit.n, sha256(body[8:]))
        elif kind == ARCHIVES:
            for row in rows_unpack(body, ARCHIVE_ROW, 'ARCHIVES'):
                archives[row[0]] = row[1:]
    if head[0] == remote.head[0] and head != remote.head:
        raise CorruptError('The server shows two heads at commit %d'
                           % head[0])
    if live_digest(archives) != (commit.live if commit else NOTHING):
        wrong = ('The server\'s list of archives is not the one signed in '
                 'commit %d: it hides, adds or swaps archives' % head[0])
        if not opt.accept_rollback:
            raise CorruptError(wrong + ' (if a part of it is really lost: '
                               '--accept-rollback)')
        warn(wrong)
    if head[0] != remote.head[0]:
        history_follow(remote, *sorted((head, remote.head)))
    if opt.cachedir and not opt.accept_rollback:
        seen = cache_seen(opt.cachedir, remote.key)
        if seen:
            history_follow(remote, seen, head)
    if opt.expect_head:
        history_expect(remote, opt.expect_head, head)
    remote.head = head
    return archives


##############################################################################
# Cache directory
#
# What is stored already and how often it is used (`directory`), what the last
# runs saw (`cache`, safe to lose), and the deltas of a transaction under way
# (`pending`), applied once, in order, after its commit is known.  A block's
# count is the number of distinct existing blocks that name it, plus one for a
# linked record; only blocks at zero are ever deleted.  Asks no server.
##############################################################################

SQL_DIRECTORY = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS blocks(
    name BLOB PRIMARY KEY,      -- 32 bytes
    cls TEXT,                   -- c, i, a
    count INTEGER,              -- distinct existing parents
    plain INTEGER,              -- bytes; NULL: not known yet
    stored INTEGER,             -- bytes as billed
    tplain INTEGER,             -- with everything below, times counted
    tstored INTEGER,
    kids BLOB                   -- packed Kids of index blocks and records
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unused ON blocks(name) WHERE count = 0;
CREATE INDEX IF NOT EXISTS unread ON blocks(name)
    WHERE kids IS NULL AND cls <> 'c';
CREATE INDEX IF NOT EXISTS parents ON blocks(name) WHERE kids IS NOT NULL;
CREATE TABLE IF NOT EXISTS archives(
    id BLOB PRIMARY KEY, record BLOB, lineage BLOB, state INTEGER,
    time INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS small(
    digest BLOB PRIMARY KEY, extents BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rotten(  -- blocks that --fsck found damaged
    name BLOB PRIMARY KEY) WITHOUT ROWID;
"""

SQL_PENDING = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS delta(
    name BLOB,
    parent BLOB,                -- the row counts one reference by it
    cls TEXT, d INTEGER, plain INTEGER, stored INTEGER,
    tplain INTEGER, tstored INTEGER, kids BLOB);
CREATE TABLE IF NOT EXISTS borrowed(name BLOB);
CREATE TABLE IF NOT EXISTS small(
    digest BLOB PRIMARY KEY, extents BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS memo(
    first BLOB, profile BLOB, digest BLOB, name BLOB, entries INTEGER,
    bytes INTEGER, final INTEGER, body BLOB, uses BLOB, id INTEGER);
"""

SQL_MEMO = """
CREATE TABLE IF NOT EXISTS memo(
    id INTEGER PRIMARY KEY,
    first BLOB,                 -- hash of the first member name
    profile BLOB,               -- operands, -C and options that change rows
    digest BLOB,                -- of all stat data; NULL: never matches whole
    name BLOB,                  -- the page
    entries INTEGER, bytes INTEGER,
    final INTEGER,              -- the archive ended with it
    body BLOB,                  -- stat data, refs and rows, deflated
    run INTEGER);               -- last run that used it
CREATE INDEX IF NOT EXISTS memo_first ON memo(first);
CREATE TABLE IF NOT EXISTS profile(name BLOB PRIMARY KEY, run INTEGER);
CREATE TABLE IF NOT EXISTS uses(
    chunk BLOB, memo INTEGER, live INTEGER, PRIMARY KEY(chunk, memo))
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS uses_memo ON uses(memo);
CREATE TABLE IF NOT EXISTS repack(chunk BLOB PRIMARY KEY) WITHOUT ROWID;
"""

DATABASE_CACHE = 2 * MIB    # of each database in memory
CANDIDATES = 4              # memo pages kept for one first member
PROFILE_RUNS = 20           # runs after which a profile not used is dropped
CATCH_UP = 256              # commits of others that are applied together
LEARN = 50000               # references that are entered together; 8 MB
LOCK_POLL = 0.2             # s between two looks at a lock that is held
SMALL_EXTENT = struct.Struct('>32sIII')     # chunk, its length, offset, length
USE = struct.Struct('>32sI')                # chunk, live bytes


def database_limit(db, most):
    """Keep so many bytes of a database in memory."""
    db.execute('PRAGMA cache_size=-%d' % (most // KIB))


def database(path, script, synchronous):
    """Open the SQLite file `path`, made and brought up to `script`.

    Rollback journal: nothing lies beside the file, and it works on network
    homes.
    """
    import sqlite3
    db = sqlite3.connect(path, timeout=300, isolation_level=None)
    db.execute('PRAGMA synchronous=%s' % synchronous)
    try:
        os.chmod(path, 0o600)
    except OSError:
        pass            # another user's, or read-only: SQLite says what fails
    database_limit(db, DATABASE_CACHE)
    db.executescript(script)
    return db


def rollback(db):
    """Take a transaction back, if SQLite has not: out of space, it has."""
    if db.in_transaction:
        db.execute('ROLLBACK')


def cachedir_make(path):
    """Make the cache directory and its parents, 0700 each, saying so."""
    missing = []
    try:
        where = os.path.abspath(path)
    except OSError as e:
        raise UserError('Cannot find cache directory %s below a current '
                        'directory that is gone: %s' % (path, e.strerror)
                        ) from None
    while not os.path.isdir(where):
        missing.append(where)
        where = os.path.dirname(where)
    for where in reversed(missing):
        try:
            os.mkdir(where, 0o700)
        except OSError as e:
            raise UserError('Cannot create cache directory %s: %s'
                            % (where, e.strerror)) from None
        note('Directory %s created for "--cachedir %s"\n' % (where, path))
    mode = os.stat(path).st_mode
    if stat.S_IMODE(mode) & 0o077:
        try:
            os.chmod(path, 0o700)
        except OSError:
            pass


def cachedir_lock(path, wait=0):
    """An exclusive lock on the cache directory, held while it is open; asked
    for again until `wait` seconds are over.

    lockf, never flock: an outer flock on this file must not stop us.  The
    descriptor is opened once, as closing any other would drop the lock.
    """
    import fcntl
    try:
        fd = os.open(os.path.join(path, 'lockf'), os.O_RDWR | os.O_CREAT,
                     0o600)
    except OSError as e:
        raise UserError('Error reading cache directory %s: %s'
                        % (path, e.strerror)) from None
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as e:
            left = end - time.monotonic()
            if e.errno in (errno.EAGAIN, errno.EACCES) and left > 0:
                time.sleep(min(left, LOCK_POLL))
                continue
            os.close(fd)
            if e.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError('Transaction already in progress (cache '
                                'directory %s is locked)' % path) from None
            raise UserError('Cannot lock cache directory %s: %s'
                            % (path, e.strerror)) from None


def small_pack(digest, extents):
    """The row of a small file: (chunk, its length, offset, length) each.

    With a checksum, as a wrong row would be a wrong file in every archive
    from then on.
    """
    body = b''.join(SMALL_EXTENT.pack(*extent) for extent in extents)
    return body + U32.pack(zlib.crc32(digest + body))


def small_unpack(digest, packed):
    """What small_pack() packed; None if it is damaged."""
    body, check = packed[:-4], packed[-4:]
    if len(body) % SMALL_EXTENT.size or \
            U32.pack(zlib.crc32(digest + body)) != check:
        return None
    return list(SMALL_EXTENT.iter_unpack(body))


def meta_check(meta):
    """Checksum of the rows of a cache's meta table."""
    return sha256(b''.join(b'%b\0%b\0' % (key.encode(), meta[key])
                           for key in sorted(meta) if key != 'check'))


# What SQLite says where the disk, not a file of ours, is in the way; making
# the files anew would not help, or do harm.
NO_DAMAGE = ('database or disk is full', 'database is locked',
             'attempt to write a readonly database')


def cache_trouble(path, error):
    """The line for an error of SQLite's, or of what it read, in `path`."""
    if str(error) in NO_DAMAGE:
        return 'Error writing cache directory %s: %s' % (path, error)
    return 'Error reading cache directory %s: %s (if it is damaged, run ' \
        '--fsck)' % (path, error)


def cache_seen(path, key):
    """The head (n, H_n) a cache directory remembers, or None.  No lock."""
    meta = cache_meta(path)
    if meta.get('machine') != U64.pack(key.machine) or 'head' not in meta:
        return None
    return U64.unpack(meta['n'])[0], meta['head']


def cache_note(path, name, data):
    """Write a small file beside a cache; whole or not at all.  No lock."""
    path = os.path.join(path, name)
    fd = os.open(path + '.new', os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                 | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(path + '.new', path)


def cache_there(path):
    """True if a cache directory has something in it; UserError if this user
    may not even see that.
    """
    try:
        return stat.S_ISREG(os.stat(os.path.join(path, 'directory')).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise UserError('Error reading cache directory %s: %s'
                        % (path, e.strerror)) from None


def cache_meta(path):
    """What a cache directory's meta table holds, {} if there is none."""
    import sqlite3
    where = os.path.join(path, 'directory')
    if not cache_there(path):
        return {}
    try:
        db = sqlite3.connect('file:%s?mode=ro' % ''.join(
            '%%%02x' % byte for byte in os.fsencode(os.path.abspath(where))),
            uri=True, timeout=300)
        try:
            meta = dict(db.execute('SELECT key, value FROM meta'))
        finally:
            db.close()
        if meta and meta_check(meta) != meta.get('check'):
            raise ValueError('checksum differs')
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as e:
        raise UserError(cache_trouble(path, e)) from None
    return meta


def inconsistent():
    """What a cache says that lacks a block, or what is below it."""
    return UserError('Directory is not consistent with archive: Run --fsck')


SHARDS = 16     # of what is gathered: SQLite needs memory for what it sorts
INSERT_BLOCK = ('INSERT OR IGNORE INTO blocks '
                'VALUES(?, ?, ?, NULL, ?, NULL, NULL, NULL)')


class Cache:
    """An open cache directory.

    Everything here is about committed state; `pending` belongs to the
    Transaction.
    """

    def __init__(self, path, key, lock=True, wait=0, write=True):
        """Open `path` for the machine of `key`; UserError if it is another's
        or cannot be read, nor written if `write`, or stays locked for `wait`
        seconds.
        """
        import sqlite3
        self.path = path
        self.key = key
        self.lockf = cachedir_lock(path, wait) if lock else None
        self.db = None
        self.gathering = False      # changes are not in `blocks` yet
        try:
            # EXTRA: also the end of the journal is on disk, without which
            # a power cut takes the commit back.
            self.db = database(os.path.join(path, 'directory'),
                               SQL_DIRECTORY, 'EXTRA')
            # Where it may not write SQLite reads, and says so too late.
            if write:
                self.db.execute('BEGIN IMMEDIATE')
                rollback(self.db)
            self.load()
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as e:
            self.close()
            raise UserError(cache_trouble(path, e)) from None
        except BaseException:
            self.close()
            raise

    def load(self):
        """Read the meta row; ValueError and the like if it is damaged."""
        self.meta = dict(self.db.execute('SELECT key, value FROM meta'))
        self.new = not self.meta
        self.blank = self.empty()   # spares a first run every look-up
        if self.new:
            self.n, self.head = 0, self.key.genesis()
            self.totals = (0,) * 9
            self.partial = self.damaged = False
            return
        if meta_check(self.meta) != self.meta.get('check'):
            raise ValueError('checksum differs')
        if self.meta['machine'] != U64.pack(self.key.machine):
            raise UserError('Cache directory %s belongs to the key of another '
                            'machine' % self.path)
        self.n = U64.unpack(self.meta['n'])[0]
        self.head = self.meta['head']
        self.totals = TOTALS.unpack(self.meta['totals'])
        self.partial = bool(self.meta.get('partial'))
        self.damaged = bool(self.meta.get('damaged'))   # says --fsck

    def save(self):
        """Write the meta row, inside the caller's SQLite transaction."""
        rows = {'machine': U64.pack(self.key.machine), 'n': U64.pack(self.n),
                'head': self.head, 'totals': TOTALS.pack(*self.totals),
                'partial': b'1' if self.partial else b'',
                'damaged': b'1' if self.damaged else b'',
                'lineage': self.meta.get('lineage', b'')}
        rows['check'] = meta_check(rows)
        self.db.executemany('INSERT OR REPLACE INTO meta VALUES(?, ?)',
                            rows.items())
        self.new = False

    def publish(self):
        """Point `cseq` at the head: what other programs take for a tag."""
        where = os.path.join(self.path, 'cseq')
        fresh = where + '.new'
        try:
            os.unlink(fresh)
        except FileNotFoundError:
            pass
        os.symlink(self.head.hex(), fresh)
        os.rename(fresh, where)

    def close(self):
        if self.db is not None:
            self.db.close()
            self.db = None
        if self.lockf is not None:
            os.close(self.lockf)
            self.lockf = None

    # Reading.

    def find(self, name):
        """(cls, count, plain, stored, tplain, tstored) of a block, or None."""
        if self.blank:
            return None
        return self.db.execute(
            'SELECT cls, count, plain, stored, tplain, tstored '
            'FROM blocks WHERE name = ?', (name,)).fetchone()

    def kids(self, name):
        """The Kids of an index block or record; None if not known."""
        row = self.db.execute('SELECT kids FROM blocks WHERE name = ?',
                              (name,)).fetchone()
        if row is None or row[0] is None:
            return None
        return [Kid(*fields) for fields in KID.iter_unpack(row[0])]

    def small(self, digest):
        """[(chunk, its length, offset, length)] of a small file, or None."""
        if self.blank:
            return None
        row = self.db.execute('SELECT extents FROM small '
                              'WHERE digest = ?', (digest,)).fetchone()
        return row and small_unpack(digest, row[0])

    def archives(self):
        """Live archives: id -> (record, lineage, state, receive time)."""
        return {row[0]: row[1:] for row in self.db.execute(
            'SELECT id, record, lineage, state, time FROM archives')}

    def empty(self):
        """True if no block is known."""
        return self.db.execute('SELECT 1 FROM blocks LIMIT 1'
                               ).fetchone() is None

    # Catching up with what others committed.

    def catch_up(self, changes):
        """Apply verified Changes made elsewhere; durable on return.

        Blocks put by others are known by name and stored length only, until
        read_missing() of the transaction reads what they refer to.  True if
        anything changed.
        """
        archives, moved = self.archives(), 0
        try:
            for change in changes:
                if not self.db.in_transaction:
                    self.db.execute('BEGIN IMMEDIATE')
                self.catch_up_one(archives, change)
                moved += 1
                if moved % CATCH_UP == 0:
                    self.commit()
        finally:
            # What came before an error was verified, and is kept.
            if self.db.in_transaction:
                self.commit()
        if moved:
            self.publish()
        return moved > 0

    def commit(self):
        """Make the SQLite transaction durable, or take all of it back."""
        try:
            self.db.execute('COMMIT')
        except BaseException:
            rollback(self.db)
            self.load()
            raise

    def catch_up_one(self, archives, change):
        """Apply one Change, or nothing of it, inside a SQLite transaction.

        `archives` is the map of them before it, and after it.
        """
        self.db.execute('SAVEPOINT one')
        try:
            archives_apply(archives, change)
            self.absorb(change)
            self.archives_change(archives, change.commit)
            self.save()
            self.db.execute('RELEASE one')
        except BaseException:
            if self.db.in_transaction:      # out of space, it is not
                self.db.execute('ROLLBACK TO one')
            self.load()
            raise

    def absorb(self, change):
        """The blocks and totals of one Change."""
        commit = change.commit
        self.blank = False
        if self.gathering:
            self.gather_change(change)
        else:
            self.absorb_blocks(change)
        self.n, self.head = commit.n, change.hash
        if commit.kind == KIND_NUKE:
            self.totals = (0,) * 9
        elif commit.kind != KIND_ABORT and self.key.mix_refs:
            self.note_take(commit)
        self.partial = self.unread() is not None

    def absorb_blocks(self, change):
        """The blocks of one Change."""
        commit = change.commit
        self.db.executemany(INSERT_BLOCK, (
            (name, cls.decode(), 0, stored)
            for name, cls, stored in sorted(change.added)))
        if commit.kind == KIND_NUKE:
            self.db.execute('DELETE FROM blocks')
            self.db.execute('DELETE FROM small')
        for link in commit.unlinked:
            self.recount(link[1], -1)
        for link in commit.linked:
            self.recount(link[1], 1)
        self.forget(change.removed)

    def note_take(self, commit):
        """Have the totals that stand in a commit.

        Whoever has stolen a key can sign one with a note that does not open.
        That is no reason to keep everybody from his archives: the totals stay
        what they were.
        """
        try:
            self.totals = note_open(self.key, commit)
        except CorruptError as e:
            warn('%s; statistics of all archives may be wrong' % e)

    def recount(self, name, step):
        self.db.execute('UPDATE blocks SET count = count + ? WHERE name = ?',
                        (step, name))

    def forget(self, names):
        """Blocks that exist no more: drop them and their references."""
        for name in names:
            row = self.db.execute('SELECT kids FROM blocks WHERE name = ?',
                                  (name,)).fetchone()
            if row and row[0]:
                for kid in {kid[1] for kid in KID.iter_unpack(row[0])}:
                    self.recount(kid, -1)
            self.db.execute('DELETE FROM blocks WHERE name = ?', (name,))
            self.db.execute('DELETE FROM rotten WHERE name = ?', (name,))

    def unread(self, most=1, rotten=True):
        """Names and classes of blocks whose references are not known; with
        `rotten`, also of those that are damaged.
        """
        rows = self.db.execute(
            "SELECT name, cls FROM blocks WHERE kids IS NULL AND cls <> 'c' "
            'AND (? OR name NOT IN (SELECT name FROM rotten)) LIMIT ?',
            (rotten, most)).fetchall()
        return rows or None

    def rotten(self):
        """Names of blocks that --fsck found damaged on the server."""
        return [row[0] for row in self.db.execute('SELECT name FROM rotten')]

    def rot(self, names):
        """Remember that these are damaged."""
        self.db.executemany('INSERT OR IGNORE INTO rotten VALUES(?)',
                            [(name,) for name in names])

    def mended(self, names):
        """These are whole again."""
        self.db.executemany('DELETE FROM rotten WHERE name = ?',
                            [(name,) for name in names])

    def learn(self, blocks):
        """Enter what blocks refer to: [(name, plain length, kids)].

        In order of name, as each row may lie on a page of its own.
        """
        self.db.execute('BEGIN IMMEDIATE')
        self.kids_enter(blocks)
        self.refer(sorted(references(blocks)))
        self.partial = self.unread() is not None
        self.save()
        self.db.execute('COMMIT')

    def kids_enter(self, blocks):
        """What learn() has of the blocks themselves."""
        self.db.executemany(
            'UPDATE blocks SET plain = coalesce(?, plain), kids = ? '
            'WHERE name = ?',
            [(plain, b''.join(kid.pack() for kid in kids), name)
             for name, plain, kids in blocks])

    def refer(self, rows):
        """Count references, in order of name: (name, plain length, whether it
        is a chunk, how many).
        """
        self.db.executemany(
            'UPDATE blocks SET count = count + ?4, '
            'plain = coalesce(plain, ?2), '
            'tplain = CASE WHEN ?3 THEN coalesce(plain, ?2) ELSE tplain END, '
            'tstored = CASE WHEN ?3 THEN stored ELSE tstored END '
            'WHERE name = ?1', rows)

    # The same for all that are stored: in a Cache that is still empty blocks,
    # and then references, are gathered as they come, and entered at the end,
    # when they can be sorted.

    def gather_begin(self):
        """Have a file for them in the directory, which goes with it."""
        self.gathering = True
        self.db.execute('DROP INDEX unused')    # all are, until counted
        # What SQLite sorts does not fit into every /tmp.
        os.environ['SQLITE_TMPDIR'] = os.path.abspath(self.path)
        self.db.execute('ATTACH ? AS gathered', (os.fsencode(
            os.path.join(self.path, 'references')),))
        self.db.execute('PRAGMA gathered.journal_mode=OFF')
        self.db.execute('PRAGMA gathered.synchronous=OFF')
        for part in range(SHARDS):
            self.db.execute('CREATE TABLE gathered.events%d('
                            'name BLOB, cls TEXT, step INTEGER, '
                            'stored INTEGER)' % part)
            self.db.execute('CREATE TABLE gathered.refs%d('
                            'name BLOB, plain INTEGER, chunk INTEGER, '
                            'parent INTEGER, times INTEGER)' % part)
        self.db.execute('CREATE TABLE gathered.parents('
                        'id INTEGER PRIMARY KEY, name BLOB, kids INTEGER)')
        self.db.execute('CREATE TABLE gathered.sums(parent INTEGER, '
                        'kids INTEGER, plain INTEGER, stored INTEGER)')

    def gather_change(self, change):
        """Write down what a Change says of blocks."""
        commit = change.commit
        if commit.kind == KIND_NUKE:
            for part in range(SHARDS):
                self.db.execute('DELETE FROM gathered.events%d' % part)
            return
        self.gather_events(
            (name, cls.decode(), 0, stored)
            for name, cls, stored in sorted(change.added))
        self.gather_events(sorted(
            [(link[1], None, -1, None) for link in commit.unlinked]
            + [(link[1], None, 1, None) for link in commit.linked]))
        self.gather_events((name, None, 0, None)
                           for name in sorted(change.removed))

    def gather_events(self, events):
        """Write down events as blocks_left() takes them, in order of name."""
        for part, rows in parted(events):
            self.db.executemany('INSERT INTO gathered.events%d '
                                'VALUES(?, ?, ?, ?)' % part, rows)

    def gathered_changes(self):
        """Enter the blocks that are left after all changes."""
        self.gathering = False
        self.db.execute('BEGIN IMMEDIATE')
        for part in range(SHARDS):
            self.db.executemany(INSERT_BLOCK, blocks_left(self.db.execute(
                'SELECT name, cls, step, stored FROM gathered.events%d '
                'ORDER BY name, rowid' % part)))
            self.db.execute('DROP TABLE gathered.events%d' % part)
        self.partial = self.unread() is not None
        self.save()
        self.db.execute('COMMIT')

    def gather(self, blocks):
        """As learn(), of which gathered() does the rest."""
        self.db.execute('BEGIN IMMEDIATE')
        self.kids_enter(blocks)
        refs = [row for name, _, kids in blocks
                for row in self.gather_kids(name, kids)]
        for part, rows in parted(sorted(refs, key=operator.itemgetter(0))):
            self.db.executemany('INSERT INTO gathered.refs%d '
                                'VALUES(?, ?, ?, ?, ?)' % part, rows)
        self.db.execute('COMMIT')

    def gather_kids(self, name, kids):
        """Rows of what block `name` refers to; with a parent's id where these
        are chunks, each of them once, which are added up as well.
        """
        parent, unique = None, {kid.name: kid for kid in kids}
        if len(unique) == len(kids) and all(kid.cls == CHUNK for kid in kids):
            parent = self.db.execute(
                'INSERT INTO gathered.parents(name, kids) VALUES(?, ?)',
                (name, len(kids))).lastrowid
        for kid in unique.values():
            yield (kid.name, kid.plain, kid.cls == CHUNK, parent, kid.times)

    def gathered(self):
        """Count what was gathered.  If that fails nothing here is of use."""
        self.db.execute('PRAGMA main.journal_mode=OFF')
        self.db.execute('BEGIN IMMEDIATE')
        for part in range(SHARDS):
            self.refer(self.db.execute(
                'SELECT name, max(plain), max(chunk), count(*) '
                'FROM gathered.refs%d GROUP BY name ORDER BY name' % part))
            # The limit keeps the order: blocks are looked up in it.
            self.db.execute(
                'INSERT INTO gathered.sums SELECT parent, count(tplain), '
                'sum(times * tplain), sum(times * tstored) FROM ('
                'SELECT name, parent, times FROM gathered.refs%d '
                'WHERE parent ORDER BY name LIMIT -1) AS ref '
                'CROSS JOIN main.blocks AS kid ON kid.name = ref.name '
                'GROUP BY parent' % part)
            self.db.execute('DELETE FROM gathered.refs%d' % part)
        self.partial = self.unread() is not None
        self.save()
        self.db.execute('COMMIT')
        self.db.execute('PRAGMA main.journal_mode=DELETE')

    def gather_end(self):
        """All was gathered; from now on it is as any other Cache.

        What blocks of chunks have below them is known, too.  If one of these
        is missing that is left to total(), which says so.
        """
        self.db.execute('BEGIN IMMEDIATE')
        self.db.executemany(
            'UPDATE blocks SET tplain = plain + ?2, tstored = stored + ?3 '
            'WHERE name = ?1', self.db.execute(
                'SELECT name, sum(plain), sum(stored) FROM gathered.sums '
                'JOIN gathered.parents ON id = parent GROUP BY id '
                'HAVING sum(sums.kids) = parents.kids ORDER BY name'))
        self.db.execute('COMMIT')
        self.db.executescript(SQL_DIRECTORY)

    def total(self, name):
        """(plain, stored) bytes of a block and everything below it.

        Own bytes plus, for each kid, times x its total; kept in the row.
        """
        row = self.find(name)
        if row and row[4] is not None:
            return row[4], row[5]
        stack = [name]
        while stack:
            at = stack[-1]
            row, kids = self.find(at), self.kids(at) or ()
            if row is None or row[2] is None or (
                    row[0] != 'c' and self.kids(at) is None):
                raise inconsistent()
            missing = []
            plain, stored = row[2], row[3]
            for kid in kids:
                below = self.find(kid.name)
                if below is None:
                    raise inconsistent()
                if below[4] is None:
                    missing.append(kid.name)
                else:
                    plain += kid.times * below[4]
                    stored += kid.times * below[5]
            if missing:
                stack += missing
                continue
            stack.pop()
            self.db.execute('UPDATE blocks SET tplain = ?, tstored = ? '
                            'WHERE name = ?', (plain, stored, at))
        row = self.find(name)
        return row[4], row[5]

    def totals_make(self):
        """Sum up All archives and (unique data) anew; of a whole cache."""
        whole = [self.total(row[0]) for row in self.archives().values()]
        self.totals = (sum(row[0] for row in whole),
                       sum(row[1] for row in whole), *self.unique(),
                       *self.totals[4:8], len(whole))

    def unique(self):
        """(plain, stored) bytes of all blocks."""
        return self.db.execute(
            'SELECT coalesce(sum(plain), 0), coalesce(sum(stored), 0) '
            'FROM blocks').fetchone()

    # Committing what a transaction of ours did.

    def apply(self, pending, change):
        """Do what a committed transaction recorded in the file `pending`.

        One SQLite transaction, durable on return; doing it twice is doing it
        once, because the meta row names the commit it belongs to.
        """
        if self.n >= change.commit.n:
            return
        db = self.db
        db.execute('ATTACH ? AS p', (os.fsencode(pending),))
        try:
            db.execute('BEGIN IMMEDIATE')
            try:
                self.apply_blocks()
                archives = self.archives()
                archives_apply(archives, change)
                for link in change.commit.unlinked:
                    self.recount(link[1], -1)
                for link in change.commit.linked:
                    self.recount(link[1], 1)
                    self.meta['lineage'] = link[2]
                self.forget(change.removed)
                self.archives_change(archives, change.commit)
                self.n, self.head = change.commit.n, change.hash
                if change.commit.note:
                    self.note_take(change.commit)
                self.partial = self.unread() is not None
                self.save()
                db.execute('COMMIT')
            except BaseException:
                rollback(db)
                self.load()
                raise
        finally:
            db.execute('DETACH p')

    def archives_change(self, archives, commit):
        """Write the rows that a commit changed; `archives` is after it."""
        if commit.kind == KIND_NUKE:
            self.db.execute('DELETE FROM archives')
        for archive, _ in commit.unlinked:
            self.db.execute('DELETE FROM archives WHERE id = ?', (archive,))
        for archive, *_ in commit.linked:
            self.db.execute('INSERT OR REPLACE INTO archives '
                            'VALUES(?, ?, ?, ?, ?)',
                            (archive, *archives[archive]))

    def apply_blocks(self):
        """Upsert the deltas in order of name, so that pages are filled.

        References by a block that another host stored meanwhile, and that
        are known by now, are counted already.
        """
        self.blank = False
        self.db.execute("""
            INSERT INTO blocks
            SELECT name, max(cls), sum(d), max(plain), max(stored),
                   max(tplain), max(tstored), max(kids)
            FROM p.delta WHERE parent IS NULL OR parent NOT IN
                (SELECT name FROM blocks WHERE kids IS NOT NULL)
            GROUP BY name ORDER BY name
            ON CONFLICT(name) DO UPDATE SET
                count = count + excluded.count,
                plain = coalesce(plain, excluded.plain),
                tplain = coalesce(tplain, excluded.tplain),
                tstored = coalesce(tstored, excluded.tstored),
                kids = coalesce(kids, excluded.kids)""")
        self.db.execute('INSERT OR REPLACE INTO small '
                        'SELECT digest, extents FROM p.small')


def parted(rows):
    """(shard, rows) of rows that begin with a name, in order of that."""
    return itertools.groupby(rows, lambda row: row[0][0] * SHARDS >> 8)


def blocks_left(events):
    """(name, class, count, stored length) of the blocks that are there after
    all events, which come by name: (name, class or None, step of the count,
    stored length).  Of no class and no step: it is removed.
    """
    for name, some in itertools.groupby(events, operator.itemgetter(0)):
        row = None
        for _, cls, step, stored in some:
            if cls:
                row = row or [name, cls, 0, stored]
            elif not step:
                row = None
            elif row:
                row[2] += step
        if row:
            yield row


def references(blocks):
    """(name, plain length, whether it is a chunk, 1) of each block that each
    of `blocks`, as Cache.learn() has them, refers to.
    """
    for _, _, kids in blocks:
        for kid in {kid.name: kid for kid in kids}.values():
            yield kid.name, kid.plain, kid.cls == CHUNK, 1


def memo_first(member):
    """Key of a page in the memo: a hash of its first member's name."""
    return hashlib.sha256(b'first' + member).digest()[:8]


class Memo:
    """What the last runs saw, page by page; safe to lose.

    A damaged file is thrown away in silence: everything is read again.
    """

    def __init__(self, path):
        import sqlite3
        self.path = os.path.join(path, 'cache')
        try:
            self.open()
        except (sqlite3.Error, ValueError, TypeError):
            self.lose()
            self.open()

    def open(self):
        self.db = database(self.path, SQL_MEMO, 'OFF')
        self.run = self.db.execute('SELECT coalesce(max(run), 0) + 1 '
                                   'FROM profile').fetchone()[0]
        self.repack = {row[0] for row in
                       self.db.execute('SELECT chunk FROM repack')}

    def lose(self):
        for suffix in ('', '-journal'):
            try:
                os.unlink(self.path + suffix)
            except FileNotFoundError:
                pass

    def candidates(self, first, profile):
        """Pages that began with this member, best first.

        Rows are (id, digest, name, entries, bytes, final, body).
        """
        import sqlite3
        try:
            rows = self.db.execute(
                'SELECT id, digest, name, entries, bytes, final, body '
                'FROM memo WHERE first = ? ORDER BY profile <> ?, run DESC, '
                'id DESC', (first, profile)).fetchall()
        except (sqlite3.Error, ValueError):
            return []
        kinds = [bytes, int, int, int, bytes]       # unless it is damaged
        return [row for row in rows if list(map(type, row[2:])) == kinds]

    def expected(self, profile):
        """(entries, bytes) this profile had when it was last stored."""
        import sqlite3
        try:
            return self.db.execute(
                'SELECT coalesce(sum(entries), 0), coalesce(sum(bytes), 0) '
                'FROM memo WHERE profile = ?', (profile,)).fetchone()
        except sqlite3.Error:
            return 0, 0

    def stale(self, memo):
        """True if a page uses a chunk that is to be packed anew."""
        if not self.repack:
            return False
        return any(row[0] in self.repack for row in self.db.execute(
            'SELECT chunk FROM uses WHERE memo = ?', (memo,)))

    def apply(self, pending, profile, sizes, final=True):
        """Take over the pages of a committed run from the file `pending`.

        A checkpoint (not `final`) leaves the pages it has not come to.
        `sizes(chunk)` is a chunk's plain length.  A chunk less than half used
        by the current pages of all profiles is marked for packing anew.
        """
        import sqlite3
        try:
            self.db.execute('ATTACH ? AS p', (os.fsencode(pending),))
            try:
                self.db.execute('BEGIN IMMEDIATE')
                touched = self.take_over(profile)
                if final:
                    self.prune(profile)
                self.mark(touched, sizes)
                self.db.execute('COMMIT')
            finally:
                if self.db.in_transaction:
                    self.db.execute('ROLLBACK')
                self.db.execute('DETACH p')
        except sqlite3.Error:
            self.db.close()
            self.lose()
            self.open()

    def take_over(self, profile):
        """Pages of this run replace those of the profile with their first
        member; the chunks they use or no longer use.
        """
        db, touched = self.db, set()
        rows = db.execute('SELECT first, profile, digest, name, entries, '
                          'bytes, final, body, uses, id FROM p.memo')
        for row in rows:
            if row[9] is not None:          # reused as it is
                db.execute('UPDATE memo SET run = ? WHERE id = ?',
                           (self.run, row[9]))
                continue
            for old in db.execute(
                    'SELECT id FROM memo WHERE first = ? AND profile = ?',
                    row[:2]).fetchall():
                touched |= self.drop(old[0])
            new = db.execute(
                'INSERT INTO memo(first, profile, digest, name, entries, '
                'bytes, final, body, run) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)',
                (*row[:8], self.run)).lastrowid
            uses = list(USE.iter_unpack(row[8]))
            touched.update(use[0] for use in uses)
            db.executemany('INSERT OR REPLACE INTO uses VALUES(?, ?, ?)',
                           ((chunk, new, live) for chunk, live in uses))
        db.execute('INSERT OR REPLACE INTO profile VALUES(?, ?)',
                   (profile, self.run))
        return touched

    def drop(self, memo):
        """Forget a page; the chunks it used."""
        used = {row[0] for row in self.db.execute(
            'SELECT chunk FROM uses WHERE memo = ?', (memo,))}
        self.db.execute('DELETE FROM uses WHERE memo = ?', (memo,))
        self.db.execute('DELETE FROM memo WHERE id = ?', (memo,))
        return used

    def prune(self, profile):
        """Drop pages this profile no longer has, spare candidates, and
        profiles not used for long.
        """
        db = self.db
        gone = db.execute('SELECT id FROM memo WHERE profile = ? AND run < ?',
                          (profile, self.run)).fetchall()
        gone += db.execute(
            'SELECT memo.id FROM memo JOIN profile ON profile.name = '
            'memo.profile WHERE profile.run < ?',
            (self.run - PROFILE_RUNS,)).fetchall()
        gone += db.execute(
            'SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY first '
            'ORDER BY run DESC, id DESC) AS place FROM memo) WHERE place > ?',
            (CANDIDATES,)).fetchall()
        for row in gone:
            self.drop(row[0])

    def mark(self, touched, sizes):
        """Note which shared chunks are less than half used."""
        for chunk in touched:
            live = self.db.execute('SELECT sum(live) FROM uses '
                                   'WHERE chunk = ?', (chunk,)).fetchone()[0]
            size = sizes(chunk)
            if live and size and 2 * live < size:
                self.db.execute('INSERT OR IGNORE INTO repack VALUES(?)',
                                (chunk,))
            else:
                self.db.execute('DELETE FROM repack WHERE chunk = ?',
                                (chunk,))

    def close(self):
        self.db.close()


##############################################################################
# Transaction
#
# Puts, checkpoints, the commit, and what happens when somebody else commits
# first or the connection goes.  Attempt T on base n is decided by commit n+1
# alone.  Nothing is resubmitted: what a conflict took away is read and put
# again.  Uses channel, history and cache; knows nothing of files.
##############################################################################

PUT_WINDOW = 8 * MIB        # bytes sent and not yet in the server's spool
CHECKPOINT_BYTES = 10 * 10 ** 9
CHECKPOINT_SECONDS = 3600
SMALLS = 10000              # small files' places kept in memory
SPILLED = 1 << 24           # bits that say which of them are in `pending`
MEMORY = {
    # bytes sent and not yet in the server's spool, small files' places kept,
    # bytes kept of each database
    None: (PUT_WINDOW, SMALLS, DATABASE_CACHE),
    'normalmem': (PUT_WINDOW, SMALLS, DATABASE_CACHE),
    'lowmem': (2 * MIB, 5000, MIB),
    'verylowmem': (MIB, 1000, 512 * KIB)}
# Rows of `pending` collected in memory; one of a page may have 100 KB.
ROWS = {'delta': 5000, 'small': 5000, 'memo': 50, 'borrowed': 5000}
PACE_SECONDS = 2            # over which waiting for the network is judged


class Pending:
    """The file `pending`: what the running transaction will change.

    Append-only while the transaction runs; durable once sealed with its
    commit object.
    """

    def __init__(self, path):
        import sqlite3
        self.path = os.path.join(path, 'pending')
        try:
            self.db = database(self.path, SQL_PENDING, 'OFF')
            self.meta = dict(self.db.execute('SELECT key, value FROM meta'))
        except (sqlite3.DatabaseError, ValueError):     # torn: not sealed
            self.remove()
            self.db = database(self.path, SQL_PENDING, 'OFF')
            self.meta = {}
        self.rows = {table: [] for table in ROWS}

    def add(self, table, row):
        self.rows[table].append(row)
        if len(self.rows[table]) >= ROWS[table]:
            self.flush()

    def flush(self):
        """Move collected rows into the file."""
        self.db.execute('BEGIN')
        for table, rows in self.rows.items():
            if rows:
                marks = ', '.join('?' * len(rows[0]))
                self.db.executemany('INSERT OR IGNORE INTO %s VALUES(%s)'
                                    % (table, marks), rows)
                rows.clear()
        self.db.execute('COMMIT')

    def set(self, **fields):
        """Store meta fields (bytes; None drops one)."""
        for field, value in fields.items():
            self.meta[field] = value
            if value is None:
                del self.meta[field]
                self.db.execute('DELETE FROM meta WHERE key = ?', (field,))
            else:
                self.db.execute('INSERT OR REPLACE INTO meta VALUES(?, ?)',
                                (field, value))

    def seal(self, raw):
        """Complete, with commit object `raw`; durable on return."""
        self.flush()
        self.db.execute('PRAGMA synchronous=FULL')
        self.set(commit=raw)
        self.db.execute('PRAGMA synchronous=OFF')
        fd = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_dir(os.path.dirname(self.path))

    def reset(self):
        """Forget all rows, keep the transaction's identity."""
        for table, rows in self.rows.items():
            rows.clear()
            self.db.execute('DELETE FROM %s' % table)
        if 'commit' in self.meta:
            self.set(commit=None)

    def small(self, digest):
        """Packed extents of a small file of this run."""
        row = self.db.execute('SELECT extents FROM small WHERE '
                              'digest = ?', (digest,)).fetchone()
        return row and row[0]

    def forget(self, names):
        """Drop all rows of the blocks `names`; the names of those that no
        other block of this transaction names.
        """
        self.flush()
        run = self.db.execute
        run('CREATE TEMP TABLE some(name BLOB PRIMARY KEY)')
        run('BEGIN')
        self.db.executemany('INSERT INTO some VALUES(?)',
                            ((name,) for name in names))
        kids = run('SELECT DISTINCT name FROM delta WHERE parent IN some'
                   ).fetchall()
        run('DELETE FROM delta WHERE name IN some OR parent IN some')
        run('DELETE FROM some')
        self.db.executemany('INSERT INTO some VALUES(?)', kids)
        left = {row[0] for row in run(
            'SELECT name FROM delta WHERE name IN some AND parent NOTNULL')}
        run('COMMIT')
        run('DROP TABLE some')
        return {row[0] for row in kids} - left

    def borrowed(self, names):
        """True if any of `names` was borrowed."""
        self.flush()
        names = set(names)
        return any(row[0] in names for row in
                   self.db.execute('SELECT name FROM borrowed'))

    def close(self):
        self.db.close()

    def remove(self):
        """Drop the file; the transaction is decided."""
        if getattr(self, 'db', None):
            self.db.close()
        for suffix in ('-journal', ''):
            try:
                os.unlink(self.path + suffix)
            except FileNotFoundError:
                pass


def pending_exists(cache):
    return os.path.exists(os.path.join(cache.path, 'pending'))


class Own:
    """A block this transaction has put, or is about to."""

    __slots__ = ('cls', 'plain', 'stored', 'sums', 'used', 'linked')

    def __init__(self, cls, plain=0, stored=0, used=True, linked=False):
        self.cls = cls
        self.plain = plain      # bytes of its own
        self.stored = stored    # bytes; 0 while it is being made
        self.sums = None        # (plain, stored) with what is below an index
        self.used = used        # by the walk under way
        self.linked = linked    # a block of this transaction names it


class Owned:
    """The blocks of a run: name -> Own.

    Flat, as one run may put a million chunks: what is known of a chunk that
    was put takes 41 bytes here and 4 to 11 of a hash table; as an object in a
    dict it would be 280.  A name is a hash already.
    """

    ROW = struct.Struct('=32sIIB')      # name, plain, stored, flags
    USED, LINKED = 1, 2

    def __init__(self):
        import array
        self.array = array.array
        self.clear()

    def clear(self):
        self.making = {}                # name -> Own: the others
        self.rows = bytearray()         # of chunks that were put
        self.slots = self.array('I', bytes(4 * 1024))   # 1 + number of a row

    def place(self, name):
        """(slot of a name, where its row begins or -1)."""
        slots, rows, size = self.slots, self.rows, self.ROW.size
        mask = len(slots) - 1
        slot = int.from_bytes(name[:8], 'big') & mask
        while slots[slot]:
            at = (slots[slot] - 1) * size
            if rows.startswith(name, at):
                return slot, at
            slot = slot + 1 & mask
        return slot, -1

    def get(self, name):
        """The Own of a block, or None; after a change it is set() anew."""
        own = self.making.get(name)
        if own is None:
            at = self.place(name)[1]
            if at >= 0:
                row = self.ROW.unpack_from(self.rows, at)
                # Nothing stored: it was dropped.
                return self.own(*row[1:]) if row[2] else None
        return own

    def own(self, plain, stored, flags):
        """The Own of a row."""
        return Own(CHUNK, plain, stored, bool(flags & self.USED),
                   bool(flags & self.LINKED))

    def set(self, name, own):
        """Enter a block, or what has become of it."""
        if own.cls != CHUNK or not own.stored:
            self.making[name] = own
            return
        self.making.pop(name, None)
        slot, at = self.place(name)
        if at < 0:
            at = len(self.rows)
            self.rows += bytes(self.ROW.size)
            self.slots[slot] = at // self.ROW.size + 1
        self.ROW.pack_into(self.rows, at, name, own.plain, own.stored,
                           self.USED * own.used | self.LINKED * own.linked)
        if 3 * len(self.rows) > 2 * self.ROW.size * len(self.slots):
            self.grow()

    def grow(self):
        """Twice as many slots."""
        self.slots = self.array('I', bytes(8 * len(self.slots)))
        for number, row in enumerate(self.ROW.iter_unpack(self.rows), 1):
            self.slots[self.place(row[0])[0]] = number

    def drop(self, name):
        """Forget a block."""
        self.making.pop(name, None)
        at = self.place(name)[1]
        if at >= 0:
            self.ROW.pack_into(self.rows, at, name, 0, 0, 0)

    def link(self, name, linked=True):
        """A block names this one, which need not be one of these."""
        if name in self.making:
            self.making[name].linked = linked
            return
        at = self.place(name)[1]
        if at >= 0:
            flags = at + self.ROW.size - 1
            self.rows[flags] = self.rows[flags] & ~self.LINKED | (
                self.LINKED * linked)

    def items(self):
        """(name, Own) of every block; do not set() or drop() meanwhile."""
        yield from self.making.items()
        for name, *row in self.ROW.iter_unpack(self.rows):
            if row[1]:
                yield name, self.own(*row)

    def unuse(self):
        """No block is used by the walk that begins, or named."""
        for own in self.making.values():
            own.used = own.linked = False
        size = self.ROW.size
        self.rows[size - 1::size] = bytes(len(self.rows) // size)


class Sink:
    """What a Transaction and a DryRun do alike: know blocks by name.

    `own` has the blocks of this run, `cache` those stored before.
    """

    def __init__(self, cache):
        self.cache = cache              # Cache, or None
        self.own = Owned()              # since the last commit
        self.sums = {}                  # name -> totals() of others' blocks
        self.plains = {}                # name -> length of others' chunks
        self.smalls = {}                # digest -> packed extents
        self.new = [0, 0]               # New data since the last commit
        self.sent_bytes = 0             # of blocks, in the whole run
        self.slow = False               # the network, not the processor, is
        self.rotten = set()             # stored blocks that are damaged there

    def borrow(self, name):
        """A block stored before is used by this run."""

    def meet(self, kid, below):
        """Another archive has this block, with `below` bytes under it."""

    def claim(self, name, cls, plain):
        """None if the caller must make and put this block; else its Own or
        its row in the cache, which is then borrowed.
        """
        own = self.own.get(name)
        if own is not None and own.used:
            return own
        if own is not None:         # put before a restart, noted anew
            own.used, own.plain = True, plain
            self.own.set(name, own)
            return None
        row = self.cache and self.cache.find(name)
        if row is not None and name not in self.rotten:
            self.borrow(name)
            return row
        self.own.set(name, Own(cls, plain))
        return None

    def plain(self, name):
        """Plain length of a stored block, borrowed by this; None if there
        is none, or it is not known.
        """
        own = self.own.get(name)
        if own is not None:
            return own.plain if own.used else None
        if name in self.rotten:
            return None
        row = self.cache and self.cache.find(name)
        plain = row and (row[2] or self.plains.get(name))
        if plain is not None:
            self.borrow(name)
        return plain

    def totals(self, name):
        """(plain, stored) of a block with everything below it.

        None while it is being made.
        """
        own = self.own.get(name)
        if own is not None:
            return own.sums
        if name in self.sums:
            return self.sums[name]
        return self.cache.total(name)

    def chunk_totals(self, kid):
        """totals() of a chunk: another host's length stands in its parents
        only.
        """
        own = self.own.get(kid.name)
        if own is not None:
            return (kid.plain, own.stored) if own.stored else None
        row = self.cache.find(kid.name)
        if row is None:
            raise inconsistent()
        return kid.plain, row[3]

    def known(self, name, row, plain, kids, sums):
        """This run made an index block that another host stored before and
        this cache knows by name only (`row`): now it is known.
        """
        self.sums[name] = plain + sums[0], row[3] + sums[1]

    def below(self, kids):
        """(plain, stored) of everything `kids` name, times counted; None
        while one of them is being made.
        """
        plain = stored = 0
        for kid in kids:
            found = self.chunk_totals(kid) if kid.cls == CHUNK \
                else self.totals(kid.name)
            if found is None:
                return None
            plain += kid.times * found[0]
            stored += kid.times * found[1]
        return plain, stored

    def small(self, digest):
        """[(chunk, its length, offset, length)] of a small file, or None."""
        packed = self.smalls.get(digest)
        if packed:
            return small_unpack(digest, packed)
        return self.cache and self.cache.small(digest)


class Transaction(Sink):
    """A write transaction of one machine, over connections that may break."""

    kind = KIND_WRITE

    def __init__(self, remote, cache, guard=()):
        """`guard`: archive ids that must not be live at the end."""
        super().__init__(cache)
        self.remote = remote
        self.key = cache.key
        self.guard = list(guard)
        self.order = bytearray()        # their names in the order of puts
        self.gone = set()               # names withdrawn since the last commit
        self.window = collections.deque()   # (type, body) above RECEIVED
        self.window_bytes = 0
        self.first = 0                  # number of window[0] in this BEGIN
        self.run_new = [0, 0]           # New data of the run
        self.part = None                # (archive id, record) of checkpoint
        self.spilled = bytearray()      # see spill(); empty: none are there
        self.pace = [time.monotonic(), 0.0]     # since when, waited so long
        self.changed = False            # the server's state, by us
        self.channel = None
        self.memory = MEMORY[None]      # limit_memory() sets another
        self.pending = Pending(cache.path)
        self.tid = self.pending.meta.get('tid') or os.urandom(16)
        self.lineage = os.urandom(16)
        # What a dead run noted is of no use, and a power cut may have torn it.
        self.pending.remove()
        self.pending = Pending(cache.path)
        self.pending.set(tid=self.tid)

    def limit_memory(self, name, *databases):
        """--lowmem and its like, also for `databases`."""
        self.memory = MEMORY[name]
        for db in (self.pending.db, self.cache.db, *databases):
            database_limit(db, self.memory[2])

    @property
    def base(self):
        return self.cache.n, self.cache.head

    # Sending.

    def begin(self):
        """Open the transaction, adopting what the server holds of it."""
        while True:
            try:
                self.adopt(self.begin_once())
                return
            except ChannelLost:
                continue

    def begin_once(self):
        """BEGIN on a connected channel; [(name, cls, stored)] it holds."""
        self.channel = self.remote.connect()
        with self.channel.changed:
            self.channel.received = 0
        guard = [archive for archive in self.guard
                 if not self.part or archive != self.part[0]]
        rid = self.channel.post(
            BEGIN, bytes([self.kind]), self.tid, self.lineage,
            U64.pack(self.base[0]), self.base[1], bytes([len(guard)]),
            *guard)
        held = []
        for kind, body in self.channel.stream(rid):
            if kind == ADDED:
                held += rows_unpack(body, ADDED_ROW, 'BEGUN')
        self.first = 0
        self.look()
        return held

    def look(self):
        """Find out which of the blocks that --fsck found damaged can be put
        again: those of which the server itself finds its copy damaged.

        If it is whole the damage is older than that copy, or gone: either way
        nothing may build on what this cache says of it.
        """
        names = self.cache.rotten()
        self.rotten = set(blocks_look(self.channel, names))
        if len(self.rotten) < len(names):
            raise inconsistent()

    def resume(self):
        """Go on after a lost connection.

        What the server holds must be a beginning of what was put; the rest
        is sent again if it is still here, else the input is walked again
        inside the same transaction.
        """
        puts = {frame[1][:32]: frame for frame in self.window
                if frame[0] == PUT}
        while True:
            try:
                held = self.begin_once()
                names = b''.join(row[0] for row in held
                                 if row[0] not in self.gone)
                missing = names_split(self.order[len(names):])
                if not self.order.startswith(names) or \
                        not all(name in puts for name in missing):
                    self.adopt(held)
                    raise Restart
                self.window.clear()
                self.window_bytes = 0
                for name in missing:
                    self.enqueue(*puts[name])
                self.withdraw_post([row[0] for row in held
                                    if row[0] in self.gone])
                return
            except ChannelLost:
                continue

    def adopt(self, held):
        """Own exactly what the server holds; nothing of it is used yet."""
        self.window.clear()
        self.window_bytes = 0
        self.own.clear()
        self.order.clear()
        self.gone.clear()
        for name, cls, stored in held:
            self.own.set(name, Own(cls, 0, stored, False))
            self.order += name

    def enqueue(self, kind, body):
        self.window.append((kind, body))
        self.window_bytes += len(body)
        self.channel.push(kind, body)

    def send(self, kind, body):
        """Send a frame that has no answer; waits while the window is full."""
        try:
            self.enqueue(kind, body)
            start = time.monotonic()
            self.drain(self.memory[0])
            self.pace_note(start, time.monotonic())
        except ChannelLost:
            self.resume()

    def delivered(self):
        """Have all that was put in the server's spool, so that the next run
        can complete a transaction which is sealed here.
        """
        try:
            self.drain(0)
        except ChannelLost:
            self.resume()

    def pace_note(self, start, now):
        """Judge whether the network is what the run waits for: then time
        spent on deflating better is free.
        """
        self.pace[1] += now - start
        if now - self.pace[0] > PACE_SECONDS:
            self.slow = 2 * self.pace[1] > now - self.pace[0] and \
                self.channel.link.transport != TRANSPORT_DIR
            self.pace = [now, 0.0]

    def drain(self, most):
        """Wait until at most `most` bytes are above RECEIVED."""
        channel = self.channel
        while True:
            with channel.changed:
                while channel.received <= self.first and \
                        self.window_bytes > most:
                    channel.wait()
                received = channel.received
            while self.first < received and self.window:
                self.window_bytes -= len(self.window.popleft()[1])
                self.first += 1
            if self.window_bytes <= most:
                return

    # Blocks.

    def borrow(self, name):
        self.pending.add('borrowed', (name,))

    def put(self, name, cls, sealed, plain, kids=(), totals=None):
        """Send a claimed block and note what committing it will change.

        `kids` are the Kids it names, `totals` its (plain, stored) with
        everything below; for a chunk both are left out.
        """
        own = self.own.get(name)
        fresh = not own.stored
        # A block that is put again counts as it did before.
        again = self.cache.find(name) if name in self.rotten else None
        own.stored = again[3] if again else own.stored or len(sealed)
        own.linked = own.linked or bool(again)      # a stored block names it
        own.plain, own.sums = plain, totals or (plain, own.stored)
        self.own.set(name, own)
        self.delta(name, cls, plain, own.stored, *own.sums, kids)
        if fresh and not again or self.cache.find(name) is None:
            self.new[0] += plain
            self.new[1] += own.stored
        if fresh:
            self.order += name
            self.gone.discard(name)
            self.sent_bytes += len(sealed)
            self.send(PUT, name + cls + sealed)

    def delta(self, name, cls, plain, stored, tplain, tstored, kids):
        """What committing a block does to its row and to those it names."""
        packed = b''.join(kid.pack() for kid in kids)
        self.pending.add('delta', (
            name, None, cls.decode(), 0, plain, stored, tplain, tstored,
            None if cls == CHUNK else packed))
        for kid in {kid.name: kid for kid in kids}.values():
            self.own.link(kid.name)
            self.pending.add('delta', (kid.name, name, None, 1, kid.plain,
                                       None, None, None, None))

    def known(self, name, row, plain, kids, sums):
        if name in self.sums:
            return
        super().known(name, row, plain, kids, sums)
        self.delta(name, INDEX, plain, row[3], *self.sums[name], kids)

    def add_small(self, digest, extents):
        """Remember where a small file's content is."""
        self.smalls[digest] = extents
        self.pending.add('small', (digest, extents))
        if len(self.smalls) > self.memory[1]:
            self.spill()

    def spill(self):
        """Leave the places of small files to `pending`.

        A bit stands for all digests with the same beginning: a file that was
        never seen, as most are, is seldom looked for there.
        """
        self.pending.flush()
        self.spilled = self.spilled or bytearray(SPILLED // 8)
        for digest in self.smalls:
            at = int.from_bytes(digest[:4], 'big') % SPILLED
            self.spilled[at >> 3] |= 1 << (at & 7)
        self.smalls.clear()

    def may_be_spilled(self, digest):
        """False if `pending` has no such small file."""
        at = int.from_bytes(digest[:4], 'big') % SPILLED
        return bool(self.spilled) and self.spilled[at >> 3] >> (at & 7) & 1

    def small(self, digest):
        if digest not in self.smalls and self.may_be_spilled(digest):
            packed = self.pending.small(digest)
            if packed:
                return small_unpack(digest, packed)
        return super().small(digest)

    def add_memo(self, row):
        self.pending.add('memo', row)

    def again(self):
        """Start the walk over: what was put stays, what was noted goes."""
        self.pending.reset()
        self.sums.clear()
        self.smalls.clear()
        self.spilled = bytearray()
        self.new = [0, 0]
        self.own.unuse()

    def withdraw(self, names):
        """Take back puts that will not be linked."""
        self.gone.update(names)     # before: resume() must know
        self.order = bytearray(b''.join(
            name for name in names_split(self.order)
            if name not in self.gone))
        for name in names:
            self.own.drop(name)
        try:
            self.withdraw_post(names)
        except ChannelLost:
            self.resume()

    def withdraw_unlinked(self, record):
        """Take back all puts that the archive does not need: what a dead
        run put, or a file that could not be read to its end.

        Nothing would ever name them, and nobody who reads the store anew
        could tell how long they are.
        """
        while True:
            names = []
            for name, own in self.own.items():
                if not own.linked and name != record:
                    names.append(name)
                    if own.used and self.cache.find(name) is None:
                        self.new[0] -= own.plain
                        self.new[1] -= own.stored
            if not names:
                return
            self.withdraw(names)
            self.forget(names)

    def forget(self, names):
        """Drop what was noted of these blocks, and what they name."""
        for name in self.pending.forget(names):
            self.own.link(name, False)

    def withdraw_post(self, names):
        for start in range(0, len(names), CEILING['names']):
            self.enqueue(WITHDRAW,
                         names_join(names[start:start + CEILING['names']]))

    # Committing.

    def commit(self, make_record, state, memo=None, profile=b''):
        """Make the archive exist.  Durable, here and there, on return.

        `make_record(base)` puts the record for a base and returns it; it is
        called again after a conflict.  `state` is COMPLETE, OPEN (a
        checkpoint; the transaction goes on) or PARTIAL.  Raises Restart where
        the input must be walked again.
        """
        while True:
            record = make_record(self.base)
            self.withdraw_unlinked(record.name)
            raw = self.commit_object(record, state)
            self.pending.set(profile=profile, state=bytes([state]))
            self.delivered()
            self.pending.seal(raw)
            change = self.commit_send(raw, CHECKPOINT if state == OPEN
                                      else COMMIT)
            if change:
                break
            self.pending.set(commit=None)
            self.rebase(record)
        self.committed(change, record, state, memo, profile)

    def commit_object(self, record, state):
        """C_n for linking `record` on the present base, signed."""
        commit = Commit(self.key.machine, self.base[0] + 1, self.base[1],
                        self.kind, self.tid)
        archives = self.cache.archives()
        totals = list(self.cache.totals)
        if self.part:
            commit.unlinked.append(self.part)
            del archives[self.part[0]]
            subtract(totals, self.cache.total(self.part[1]))
        link = (record.archive, record.name, self.lineage, state)
        commit.linked.append(link)
        archives[record.archive] = (record.name, self.lineage, state, 0)
        commit.live = live_digest(archives)
        commit.puts = (len(self.order) // 32, sha256(self.order))
        whole = self.totals(record.name)
        totals[:4] = (totals[0] + whole[0], totals[1] + whole[1],
                      totals[2] + self.new[0], totals[3] + self.new[1])
        totals[4:] = (*whole, self.run_new[0] + self.new[0],
                      self.run_new[1] + self.new[1], len(archives))
        commit.note = note_seal(self.key, commit.n, [
            min(max(0, n), EVERYTHING) for n in totals])
        return commit_pack(commit, self.key)

    def commit_send(self, raw, kind):
        """Send a commit until it is decided; its Change, or False if another
        took n+1.
        """
        while True:
            try:
                self.drain(0)
                answer = self.channel.call(kind, raw)[1]
                return commit_answer(answer, raw, self.key)
            except ChannelLost:
                found = commit_decided(self.remote, self.base, raw)
                if found is None:
                    found = self.resume_commit(raw)
                if found is not None:
                    return found
            except Refused as e:
                if e.code != E_CONFLICT:
                    raise
                found = commit_decided(self.remote, self.base, raw)
                if found is None:
                    raise
                return found

    def resume_commit(self, raw):
        """resume() with the commit `raw` under way; as commit_decided().

        Until BEGIN has taken the transaction over, the old connection may
        still commit it.  Then nothing of it is held, and its archive exists.
        A server that holds less has not taken it over from the one that was
        asked: before the walk begins anew, `raw` is decided.
        """
        try:
            self.resume()
        except Refused:
            found = commit_decided(self.remote, self.base, raw)
            if not found:
                raise
        except Restart:
            self.remote.close()         # its transaction is not for this
            found = commit_settle(self.remote, self.cache, raw)
            if not found:
                self.catch_up()
                self.begin()
                raise
        else:
            return None
        self.remote.close()             # what goes on begins anew
        return found

    def catch_up(self):
        """Make the newest commit the base; the Changes up to it."""
        changes = list(history_changes(self.remote, self.base))
        self.cache.catch_up(changes)
        if self.part and self.part[0] not in self.cache.archives():
            self.part = None            # somebody deleted our checkpoint
        return changes

    def rebase(self, record):
        """Go on from the newest commit after somebody else's.

        The record names its base, so it is withdrawn and made again.  Raises
        Restart if a block we borrowed is gone.
        """
        changes = self.catch_up()
        if self.channel.failed:
            self.resume()
        self.withdraw([record.name])
        self.forget([record.name])
        # What others put as well is theirs: the first copy counts.
        self.new = [0, 0]
        for name, own in self.own.items():
            if own.used and self.cache.find(name) is None:
                self.new[0] += own.plain
                self.new[1] += own.stored
        removed = [name for change in changes for name in change.removed]
        if any(change.commit.kind == KIND_NUKE for change in changes) or \
                (removed and self.pending.borrowed(removed)):
            raise Restart

    def committed(self, change, record, state, memo, profile):
        """Our commit stands: bring the cache directory up to it."""
        self.changed = True
        self.pending.close()
        self.cache.apply(self.pending.path, change)
        self.cache.mended([name for name in self.rotten
                           if self.own.get(name)])
        if memo:
            memo.apply(self.pending.path, profile, self.cache_plain,
                       state == COMPLETE)
        self.cache.publish()
        self.run_new[0] += self.new[0]
        self.run_new[1] += self.new[1]
        self.new = [0, 0]
        self.own.clear()
        self.order.clear()
        self.gone.clear()
        self.sums.clear()
        self.smalls.clear()
        self.spilled = bytearray()
        self.part = None
        if state == OPEN:
            # The count of RECEIVED goes on: it is since BEGIN, as `first`.
            self.part = (record.archive, record.name)
            self.window.clear()
            self.window_bytes = 0
            self.pending.__init__(self.cache.path)
            database_limit(self.pending.db, self.memory[2])
            self.pending.reset()
        else:
            self.pending.remove()

    def cache_plain(self, name):
        row = self.cache.find(name)
        return row and row[2]

    def abandon(self):
        """Stop without committing; what the server holds may be adopted by
        the next run, because `pending` keeps the transaction's id.
        """
        self.pending.flush()
        self.pending.close()


def subtract(totals, whole):
    """Take one archive out of All archives."""
    totals[0] -= whole[0]
    totals[1] -= whole[1]


def commit_decided(remote, base, raw):
    """The Change of commit n+1 if it is `raw`, False if it is another, None
    if there is none.
    """
    for change in history_changes(remote, base, lists=False):
        return change.hash == sha256(raw) and change
    return None


def commit_answer(body, raw, key):
    """The Change of `raw`, with the receive time that COMMITTED tells."""
    reader = Reader(body, 'answer to COMMIT')
    n, head = reader.u64(), reader.take(32)
    change = Change(raw, reader.u64(), key)
    reader.end()
    if (n, head) != (change.commit.n, change.hash):
        raise CorruptError('The server answers that it took another commit '
                           'than the one it was sent')
    return change


def synchronize(remote, cache):
    """Bring an open cache up to the server's head; durable on return.

    Applies what others committed and reads what their blocks refer to, if the
    key can.  What a dead run left undecided was decided before.
    """
    cache.catch_up(history_changes(remote, cache_base(remote, cache)))
    while remote.key.refs_priv:
        try:
            return read_missing(remote, cache)
        except Refused as e:
            # Deleted since then?  Only what is still there is damaged.
            if e.code != E_NOBLOCK or not cache.catch_up(
                    history_changes(remote, cache_base(remote, cache))):
                raise


def cache_base(remote, cache):
    """The cache's base, known to continue into the server's head."""
    remote.connect()
    if remote.head[0] < cache.n:
        raise CorruptError(
            'The server shows commit %d, but this machine has seen %d: it was '
            'rolled back or hides the newest archives (if they are really '
            'lost: --fsck --accept-rollback)' % (remote.head[0], cache.n))
    return cache.n, cache.head


def pending_decide(remote, cache, memo):
    """Roll a dead run's sealed transaction forward or declare it dead."""
    pending = Pending(cache.path)
    raw = pending.meta.get('commit')
    if raw is None:
        pending.close()             # its id is adopted by the next write
        return
    found = pending_outcome(remote, cache, raw)
    pending.close()
    if found is None:
        return
    if found:
        cache.apply(pending.path, found)
        if memo:
            memo.apply(pending.path, pending.meta.get('profile', b''),
                       lambda name: (cache.find(name) or (0,) * 3)[2],
                       pending.meta.get('state') == bytes([COMPLETE]))
        cache.publish()
    pending.remove()


def pending_outcome(remote, cache, raw):
    """What became of the commit `raw` of a dead run: as commit_decided().

    It is sent once more if that is open and we may write.  Of a damaged
    one nothing is believed: the history tells what it did.
    """
    try:
        commit = commit_unpack(raw, cache.key)
    except CorruptError:
        return False
    if cache.n >= commit.n:             # the run died after applying it
        return cache.head == sha256(raw) and Change(raw, 0, cache.key)
    if cache.n + 1 != commit.n:
        return False
    found = commit_decided(remote, (cache.n, cache.head), raw)
    if found is None and ROLE_WRITE in remote.proven:
        found = pending_send(remote, cache, commit, raw)
    return found


def pending_send(remote, cache, commit, raw):
    """Send an undecided commit of a dead run once more; as commit_decided().

    If the server cannot take it any more, commit_settle() decides.
    """
    try:
        return commit_alone(remote, commit, commit.linked[0][2], raw)
    except Refused:
        return commit_settle(remote, cache, raw)


def commit_settle(remote, cache, raw):
    """Decide the commit `raw` on the cache's base, which is not sent again:
    its Change, or False.

    An empty commit takes its number, so that it is dead for ever.
    """
    base = cache.n, cache.head
    found = commit_decided(remote, base, raw)
    if found is None:
        plain_commit(remote, cache, Commit(
            cache.key.machine, base[0] + 1, base[1], KIND_ABORT,
            os.urandom(16)), cache.archives())
        # Or `raw` was under way after all, and was first.
        found = commit_decided(remote, base, raw)
    return found


def commit_alone(remote, commit, lineage, raw):
    """Send `raw` in a transaction that puts nothing more, until it is
    decided; its Change, or False if somebody else took its number.
    """
    base = (commit.n - 1, commit.previous)
    while True:
        try:
            channel = remote.connect()
            transaction_open(channel, KIND_WRITE, commit.tid, lineage, base)
            answer = transaction_commit(channel, raw)
        except ChannelLost:
            found = commit_decided(remote, base, raw)
            if found is not None:
                return found
            continue
        change = commit_answer(answer, raw, remote.key)
        remote.saw(commit.n, change.hash)
        return change


def transaction_open(channel, kind, tid, lineage, base):
    """BEGIN, whatever the server holds of it."""
    for _ in channel.stream(channel.post(
            BEGIN, bytes([kind]), tid, lineage, U64.pack(base[0]), base[1],
            b'\0')):
        pass


def transaction_commit(channel, raw):
    """COMMIT; the answer's body.  Where it is refused, the transaction is
    given up, so that another can begin on this connection.
    """
    try:
        return channel.call(COMMIT, raw)[1]
    except Refused:
        try:
            channel.call(ABORT)
        except Refused:
            pass                    # the server had given it up itself
        raise


def plain_commit(remote, cache, commit, archives, lineage=bytes(16)):
    """Commit something that puts no block; `archives` are live after it.

    False if somebody else took the number.
    """
    commit.live = live_digest(archives)
    if commit.kind != KIND_ABORT:
        commit.note = note_seal(cache.key, commit.n, cache.totals)
    try:
        return bool(commit_alone(remote, commit, lineage,
                                 commit_pack(commit, cache.key)))
    except Refused as e:
        if e.code != E_CONFLICT:
            raise
        return False


def parts_settle(remote, cache):
    """Turn checkpoints that a dead run of this cache left into `.part`
    archives which only the delete role removes.  True if there was one.
    """
    lineage, settled = cache.meta.get('lineage'), False
    while True:
        archives = cache.archives()
        left = [(archive, row) for archive, row in archives.items()
                if row[1] == lineage and row[2] == OPEN]
        if not left:
            return settled
        archive, row = left[0]
        commit = Commit(cache.key.machine, cache.n + 1, cache.head,
                        KIND_WRITE, os.urandom(16))
        commit.unlinked.append((archive, row[0]))
        commit.linked.append((archive, row[0], lineage, PARTIAL))
        archives[archive] = (row[0], lineage, PARTIAL, 0)
        settled |= bool(plain_commit(remote, cache, commit, archives,
                                     lineage))
        cache.catch_up(history_changes(remote, (cache.n, cache.head)))


def read_missing(remote, cache):
    """Read the references of blocks that others put.

    Needs the read or the delete role.  What a broken server does not hand
    out stays missing; the cache is then partial and releases nothing.
    """
    opener, names = Opener(cache.key), Names(cache.key)
    while True:
        rows = cache.unread(512, False)
        if not rows:
            return
        classes = dict(rows)
        body = b'\x01' + names_join(list(classes))
        learned, count = [], 0
        for kind, answer in remote.ask(GET, body):
            if count > LEARN:
                cache.learn(learned)
                learned, count = [], 0
            if kind != BLOCK:
                continue
            name, block = answer[:32], answer[32:]
            if name not in classes:
                raise CorruptError('The server sent a block nobody asked for')
            learned.append(refs_learn(opener, names, name,
                                      classes[name].encode(), block))
            count += len(learned[-1][2])
        cache.learn(learned)


def blocks_look(channel, names):
    """{name: why} of those blocks of which the server has no whole copy."""
    wrong = {}
    for at in range(0, len(names), 512):
        part = names[at:at + 512]
        rid = channel.post(GET, GET_LOOK, names_join(part))
        left = collections.deque(part)
        while True:
            kind, body = channel.next(rid)
            if kind == OK:
                break
            if kind == BUSY:
                continue
            error = refusal(body) if kind == ERROR else None
            if not left or error and error.code != E_NOBLOCK:
                raise error or CorruptError('The server says more than it '
                                            'was asked')
            name = left.popleft()
            if error:
                wrong[name] = str(error)
        channel.forget(rid)
    return wrong


def damage_where(remote, damage):
    """{name: why} of damaged blocks, with the object that the server names;
    of what it finds whole it says nothing: that was bad when it came.
    """
    try:
        where = blocks_look(remote.connect(), list(damage))
    except RemoteError:
        return damage
    return {name: why + ' (the server: %s)' % where[name]
            if where.get(name, '') not in why else why
            for name, why in damage.items()}


def refs_learn(opener, names, name, cls, block):
    """(name, plain length or None, kids) from a block's refs view.

    The plain length of an index block stands in its parents.
    """
    parts = opener.open(cls, name, block, refs_only=True)
    if cls == INDEX:
        if names.index(parts[0]) != name:
            raise CorruptError('index block %s: its content is another\'s'
                               % name.hex()[:16])
        return name, None, index_unpack(parts[0], name).kids
    if names.record(parts[0]) != name:
        raise CorruptError('archive record %s: its content is another\'s'
                           % name.hex()[:16])
    record = record_unpack(parts, name, opener.key)
    return name, record_plain(parts), record.kids


def record_plain(parts):
    """A record counts with the parts that every host can read."""
    return len(parts[0]) + len(parts[1])


##############################################################################
# Walk: a tree in the order of its names
#
# Yields one lstat per entry, pre-order, names sorted as bytes, an explicit
# stack, everything relative to directory descriptors (so no path is too long).
# Every error reaches `report`; reads no file.
##############################################################################

OPEN_DIRECTORIES = 64       # descriptors kept; deeper ones are opened again

SYNTHETIC = frozenset((
    'proc', 'sysfs', 'devpts', 'devtmpfs', 'debugfs', 'tracefs', 'securityfs',
    'cgroup', 'cgroup2', 'pstore', 'efivarfs', 'bpf', 'configfs', 'fusectl',
    'mqueue', 'hugetlbfs', 'autofs', 'binfmt_misc', 'rpc_pipefs', 'nsfs',
    'selinuxfs', 'devfs', 'fdescfs', 'linprocfs', 'procfs'))


NOATIME = getattr(os, 'O_NOATIME', 0)
CACHE_TAG = b'CACHEDIR.TAG'
CACHE_SIGNATURE = b'Signature: 8a477f597d28d172789f06886806bc55'
NODUMP = 0x40               # FS_NODUMP_FL of <linux/fs.h>
# FS_IOC_GETFLAGS there: _IOR('f', 1, long).
GET_FLAGS = struct.calcsize('l') << 16 | 0x6601 | (
    0x40000000 if os.uname().machine.startswith(
        ('alpha', 'mips', 'parisc', 'ppc', 'sparc')) else 0x80000000)


def open_at(name, flags, dir_fd):
    """os.open(); without O_NOATIME where only the owner may ask for that."""
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        if not flags & NOATIME:
            raise
    return os.open(name, flags & ~NOATIME, dir_fd=dir_fd)


class Folder:
    """A directory being walked, or met on the way; its descriptor is opened
    again, and known again, after it had to be closed.
    """

    __slots__ = ('above', 'name', 'fd', 'identity', 'flags', 'open_set')

    def __init__(self, above, name, open_set, flags):
        self.above = above          # Folder, or None for a top one
        self.name = name            # bytes, below `above`
        self.fd = -1
        self.identity = None        # (st_dev, st_ino) when first opened
        self.flags = flags          # of open(2), besides the usual ones
        self.open_set = open_set    # OrderedDict of Folders with descriptors

    def get(self):
        """A descriptor on the directory; OSError as open(2) gives it."""
        if self.fd >= 0:
            return self.fd
        chain, at = [], self
        while at is not None and at.fd < 0:
            chain.append(at)
            at = at.above
        for folder in reversed(chain):
            folder.open()
        return self.fd

    def open(self):
        """Open below `above`, whose descriptor is open; the oldest of many
        descriptors is closed for it.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | self.flags
        fd = open_at(self.name, flags,
                     self.above.fd if self.above else None)
        st = os.fstat(fd)
        if self.identity not in (None, (st.st_dev, st.st_ino)):
            os.close(fd)
            raise OSError(errno.ESTALE, 'Directory was replaced')
        self.identity = (st.st_dev, st.st_ino)
        self.fd = fd
        self.open_set[self] = True
        for folder in list(self.open_set):
            if len(self.open_set) <= OPEN_DIRECTORIES:
                break
            # A child needs its parent's descriptor only while it is opened.
            if folder is not self:
                folder.close()

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            del self.open_set[self]


class Walk:
    """The entries below a list of operands.

    Iterating gives (folder, name, member, lstat): `name` is what to open in
    `folder`, `member` what to call it in the archive, both bytes.
    """

    def __init__(self, items, opt, report, skip=()):
        """`items` are ('cd', directory), ('path', operand), others: in order.

        What others name is not walked: it comes out as (folder, name, kind,
        None).  `report(text)` counts an error; `skip` has (st_dev, st_ino) of
        directories never entered, and what they are.
        """
        self.items = items
        self.opt = opt
        self.report = report
        self.skip = dict(skip)
        self.open_set = collections.OrderedDict()
        self.slashed = False            # the leading-slash warning was given
        self.slash = b''                # taken off the operand at hand
        self.types = None               # st_dev -> file system type
        # Entries that these leave out are still descended into.
        self.picks = bool(opt.newer or opt.rename)
        self.looks = bool(opt.nodump or opt.interactive)
        self.tags = bool(opt.exclude_caches or opt.exclude_if_present)
        self.flagless = set()           # st_dev of what has no file flags

    def __iter__(self):
        entries = self.entries()
        if self.opt.check_links:
            entries = links_checked(entries)
        if self.opt.disk_pause:
            entries = paced(entries, self.opt.disk_pause / 1000)
        return entries

    def folder(self, above, name, follow):
        """A Folder; its name may be a symbolic link if `follow`."""
        flags = NOATIME if self.opt.noatime else 0
        return Folder(above, name, self.open_set,
                      flags if follow else flags | os.O_NOFOLLOW)

    def entries(self):
        top = base = self.folder(None, b'.', True)
        for kind, value in self.expand():
            if kind == 'cd':
                base = self.folder(base, value, True)
            elif kind != 'path':
                yield base, value, kind, None
            elif value.startswith(b'/'):    # whatever -C says
                yield from self.operand(top, value)
            else:
                yield from self.operand(self.enter(base), value)

    def expand(self):
        """The items, with what stands in list files in its place."""
        for kind, value in self.items:
            if kind == 'list':
                yield from list_items(value, self.opt.null_input)
            else:
                yield kind, value

    def enter(self, base):
        """The directory that -C chose, once an operand needs it."""
        try:
            base.get()
        except OSError as e:
            raise UserError('Cannot change to directory %s: %s' % (
                show(base.name), e.strerror)) from None
        return base

    def close(self):
        """Close every directory still open."""
        for folder in list(self.open_set):
            folder.close()

    def operand(self, base, path):
        """Everything below one operand."""
        member = path.rstrip(b'/') or b'/'
        if not self.opt.rename:         # which sees names as they were given
            self.slash, member = self.strip(member)
        follow = self.opt.follow_operands or self.opt.follow_all
        try:
            st = self.stat(path, base, follow)
        except OSError as e:
            self.report('%s: Cannot stat: %s' % (show(path), e.strerror))
            return
        if self.unwanted(base, path, member, st):
            return
        stored = self.picked(member, st) if self.picks else member
        if stored:
            yield base, path, stored, st
        if stat.S_ISDIR(st.st_mode) and self.opt.recurse:
            yield from self.descend(self.folder(base, path, follow), member,
                                    st)

    def stat(self, name, folder, follow):
        """What `name` in `folder` is; a link of -L that leads nowhere is
        itself.
        """
        try:
            return os.stat(name, dir_fd=folder.get(), follow_symlinks=follow)
        except OSError as e:
            if not self.opt.follow_all or e.errno not in (errno.ENOENT,
                                                          errno.ELOOP):
                raise
        return os.stat(name, dir_fd=folder.get(), follow_symlinks=False)

    def strip(self, path):
        """(leading slashes that have to go, what is left of a path)."""
        if self.opt.absolute or not path.startswith(b'/'):
            return b'', path
        if not self.slashed and not self.opt.quiet:
            warn('Removing leading \'/\' from member names')
        self.slashed = True
        member = path.lstrip(b'/')
        return path[:len(path) - len(member)], member or b'.'

    def picked(self, member, st):
        """What an entry is stored as; None if it is not, though what is
        below it may be.
        """
        if self.opt.newer and not self.opt.newer.status(st):
            return None
        if not self.opt.rename:
            return member
        member = self.opt.rename(member)
        if not member:
            return None
        return self.strip(member.rstrip(b'/') or b'/')[1]

    def descend(self, top, member, st):
        """Below a directory, its own entry left out."""
        device = st.st_dev
        stack = []
        self.push(stack, top, member, st, None, device)
        follow, picks = self.opt.follow_all, self.picks
        while stack:
            folder, names, prefix, held = stack[-1]
            for name in names:
                child = prefix + name
                try:
                    st = self.stat(name, folder, True) if follow else os.stat(
                        name, dir_fd=folder.get(), follow_symlinks=False)
                except OSError as e:
                    self.report('%s: Cannot stat: %s'
                                % (show(child), e.strerror))
                    continue
                if self.unwanted(folder, name, child, st):
                    continue
                stored = self.picked(child, st) if picks else child
                if stored:
                    yield folder, name, stored, st
                if stat.S_ISDIR(st.st_mode):
                    below = self.folder(folder, name, follow)
                    self.push(stack, below, child, st, held, device)
                    break
            else:
                stack.pop()
                folder.close()

    def push(self, stack, folder, member, st, parents, device):
        """Enter a directory: its names go on the stack, sorted."""
        if self.opt.one_file_system and st.st_dev != device:
            return
        if parents is not None and st.st_dev != parents[1] and \
                self.synthetic(member, st):
            return
        here = (st.st_dev, st.st_ino)
        if self.opt.follow_all and parents and here in parents[0]:
            self.report('%s: a symbolic link leads back to its own directory'
                        % show(member))
            return
        try:
            names = os.listdir(folder.get())
        except OSError as e:
            self.report('%s: Cannot read directory: %s'
                        % (show(member), e.strerror))
            return
        names = [os.fsencode(name) for name in names]
        if self.tags:
            names = list(self.tagged(folder, names)) or names
        names.sort()
        above = parents[0] | {here} if parents and self.opt.follow_all \
            else frozenset((here,))
        stack.append((folder, iter(names), member.rstrip(b'/') + b'/',
                      (above, st.st_dev)))

    def unwanted(self, folder, name, member, st):
        """True for what does not go into the archive, nor what is below."""
        if self.opt.patterns and not self.selected(member):
            return True
        if stat.S_ISSOCK(st.st_mode):
            return True
        if self.skip and (st.st_dev, st.st_ino) in self.skip:
            if not self.opt.quiet:
                warn('Not adding %s to archive: %s' % (
                    self.skip[st.st_dev, st.st_ino], show(member)))
            return True
        return self.looks and self.refused(folder, name, member, st)

    def refused(self, folder, name, member, st):
        """True for what its flags, or the user, say no to."""
        if self.opt.nodump and self.flagged(folder, name, st):
            return True
        return self.opt.interactive and not ask(b'add', member)

    def flagged(self, folder, name, st):
        """True for a file or directory with the flag nodump."""
        if hasattr(st, 'st_flags'):         # macOS, the BSDs
            return bool(st.st_flags & stat.UF_NODUMP)
        if not (stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)) \
                or st.st_dev in self.flagless:
            return False
        import fcntl
        fd = -1
        try:
            fd = open_at(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
                         | (NOATIME if self.opt.noatime else 0),
                         folder.get())
            flags = fcntl.ioctl(fd, GET_FLAGS, bytes(8))
        except OSError as e:                # who reads it says what is wrong
            if e.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                self.flagless.add(st.st_dev)
            return False
        finally:
            if fd >= 0:
                os.close(fd)
        return bool(int.from_bytes(flags[:4], sys.byteorder) & NODUMP)

    def tagged(self, folder, names):
        """The names that mark a directory as not to be stored; then they are
        all that is stored of it.
        """
        tags = [name for name in self.opt.exclude_if_present if name in names]
        if self.opt.exclude_caches and CACHE_TAG in names:
            try:
                fd = os.open(CACHE_TAG, os.O_RDONLY | os.O_NONBLOCK
                             | os.O_NOFOLLOW, dir_fd=folder.get())
                try:
                    head = os.read(fd, len(CACHE_SIGNATURE))
                finally:
                    os.close(fd)
            except OSError:
                head = b''
            if head == CACHE_SIGNATURE:
                tags.append(CACHE_TAG)
        return set(tags)

    def selected(self, member):
        """What the patterns say: to --exclude a path is what was given, to
        --include that or what it is called in the archive.
        """
        patterns, path = self.opt.patterns, member
        if self.slash:
            path = self.slash + member
            if member.startswith(b'./'):        # the operand was '/'
                path = self.slash + member[2:]
        return not patterns.excluded(path) and (
            patterns.included(path)
            or path is not member and patterns.included(member))

    def synthetic(self, member, st):
        """True, with a warning, for a mounted file system made of air."""
        if self.types is None:
            self.types = mount_types()
        kind = self.types.get(st.st_dev)
        if kind not in SYNTHETIC or self.opt.insane_filesystems:
            return False
        if not self.opt.quiet:
            warn('Not descending into filesystem of type %s: %s'
                 % (kind, show(member)))
        return True


def links_checked(entries):
    """The entries; at their end it is said which files have names that were
    not among them.
    """
    links = {}                  # (st_dev, st_ino) -> [names not met, all, one]
    for entry in entries:
        st = entry[3]
        if st is not None and st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            row = links.setdefault((st.st_dev, st.st_ino), [
                st.st_nlink, st.st_nlink, entry[2]])
            row[0] -= 1
        yield entry
    for left, count, member in links.values():
        if left > 0:
            warn('%s: %d of its %d names are missing in the archive'
                 % (show(member), left, count))


def paced(entries, seconds):
    """The entries, with a pause before each."""
    for entry in entries:
        time.sleep(seconds)
        yield entry


def directories_skipped(opt):
    """(st_dev, st_ino) of directories that never go into an archive -> what
    they are.
    """
    out = {}
    for what, path in (('server directory', opt.key and opt.key.server),
                       ('server directory', opt.server),
                       ('cache directory', opt.cachedir)):
        try:
            st = os.stat(path)
            if stat.S_ISDIR(st.st_mode):
                out[st.st_dev, st.st_ino] = what
        except (OSError, TypeError, ValueError):
            pass
    return out


def mount_types():
    """st_dev -> type of what is mounted, where the system tells."""
    types = {}
    try:
        with open('/proc/self/mountinfo', errors='surrogateescape') as file:
            for line in file:
                left, _, right = line.partition(' - ')
                major, _, minor = left.split()[2].partition(':')
                types[os.makedev(int(major), int(minor))] = right.split()[0]
    except OSError:
        pass
    return types


##############################################################################
# Workers: cutting, deflating, sealing and opening in processes of their own
#
# Deflate, and AES for cuts and seals, are most of a first backup; the way back
# is half of a restore.  In threads they would wait for the interpreter with
# all else (1.55 of 2 processors were busy, 1.4 in a restore), so they run in
# processes, forked before this one has a thread.  Blocks go over and come back
# in shared memory; two pipes say which slot is whose turn.  Everything else,
# naming and looking up too, stays in the process that forks: in one thread of
# a backup, in a Fetcher's of a restore.  Knows blocks and Scans, nothing of
# files or servers.
##############################################################################

JOB = 512 * KIB             # plain bytes handed over at once, about
JOB_BLOCKS = 256            # blocks in a job at most
SLOT = MIB                  # room for a job, plain or sealed
SLOTS = 4                   # for each worker: what is easy to deflate and
                            # what is not take turns; 8 cost 4 MB more
WORKERS_MOST = 4            # reading and cutting keep no more of them busy
WORKERS_NICE = 5            # of a backup: who feeds them goes first, which
                            # is 4 % less, all in all
SAMPLE = 32                 # one chunk in so many is opened again and compared
SAMPLE_FIRST = 100          # and these of each worker
IN_VAIN = 4                 # chunks in a row that did not shrink: of the next
                            # one pieces are tried first

# Slot, blocks, level or -1; or slot, bytes, SCANNING; or slot, blocks, any.
JOB_MESSAGE = struct.Struct('>IIb')
SCANNING = -2
# Slot, blocks or hits; NO_BLOCKS: a text; ALL_HITS: there was no room.
JOB_RESULT = struct.Struct('>II')
JOB_BLOCK = struct.Struct('>32scB')     # name, class, parts
NO_BLOCKS = 0xffffffff
ALL_HITS = 0xfffffffe
HIT = struct.Struct('>IB')              # end, value
OPEN_BLOCK = struct.Struct('>32sII')    # name, plain bytes, bytes of BLOCK
OPENED = struct.Struct('>BI')           # PLAIN or another, bytes that follow
PLAIN, DAMAGED, UNCLEAR = range(3)      # the content, or a text why not
OPENED_TEXT = 300                       # bytes of a text at most


def processors():
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


class Worker:
    """What runs in a worker: jobs from a pipe, until it is closed.

    A subclass has block(view, at, level), which does what is asked for at
    `at`: where the next block begins, and the head and data to answer.
    """

    def __init__(self, slots, jobs, results):
        self.slots = slots              # shared memory
        self.jobs = jobs                # descriptor to read from
        self.results = results          # descriptor to write to

    def run(self):
        while True:
            message = os.read(self.jobs, JOB_MESSAGE.size)
            if not message:
                return
            slot, count, level = JOB_MESSAGE.unpack(message)
            try:
                count = self.job(slot * SLOT, count, level)
            except (RuntimeError, MemoryError) as e:
                text = str(e).encode('utf-8', 'replace')[:KIB]
                U32.pack_into(self.slots, slot * SLOT, len(text))
                pos = slot * SLOT + U32.size
                self.slots[pos:pos + len(text)] = text
                count = NO_BLOCKS
            os.write(self.results, JOB_RESULT.pack(slot, count))

    def job(self, pos, count, level):
        """Put the answers in the place of the blocks of the slot at `pos`;
        the count to answer.
        """
        out, at = [], pos
        with memoryview(self.slots) as view:
            for _ in range(count):
                at, *answer = self.block(view, at, level)
                out += answer
            for piece in out:
                view[pos:pos + len(piece)] = piece
                pos += len(piece)
        return count


class SealWorker(Worker):
    """A worker of a Crew."""

    def __init__(self, sealer, check_all, *pipes):
        super().__init__(*pipes)
        self.sealer = sealer
        self.check_all = check_all      # open every block again
        self.made = 0                   # blocks, for the sample
        self.in_vain = 0                # chunks deflated in vain, in a row
        self.scanner = None

    def job(self, pos, count, level):
        if level == SCANNING:
            return self.scan(pos, count)
        return super().job(pos, count, None if level < 0 else level)

    def block(self, view, at, level):
        name, cls, parts = JOB_BLOCK.unpack_from(view, at)
        at += JOB_BLOCK.size
        lengths = struct.unpack_from('>%dI' % parts, view, at)
        at += U32.size * parts
        datas = []
        for length in lengths:
            datas.append(view[at:at + length])
            at += length
        sealed = self.seal(cls, name, datas, level)
        return at, U32.pack(len(sealed)), sealed

    def scan(self, pos, length):
        """Put the hits of a piece in its place; how many, or ALL_HITS."""
        self.scanner = self.scanner or Scanner(cut_key(self.sealer.key))
        with memoryview(self.slots)[pos:pos + length] as piece:
            hits = self.scanner.hits(piece)
        if len(hits) * HIT.size > SLOT:
            return ALL_HITS
        for number, hit in enumerate(hits):
            HIT.pack_into(self.slots, pos + number * HIT.size, *hit)
        return len(hits)

    def seal(self, cls, name, parts, level):
        """The sealed block; opened again and compared, all or a sample."""
        if self.in_vain >= IN_VAIN and cls == CHUNK \
                and not shrinks(parts[0]):
            level = 0
        sealed = self.sealer.seal(cls, name, parts, level)
        if cls == CHUNK:
            self.in_vain = 0 if len(sealed) < len(parts[0]) \
                else self.in_vain + 1
        self.made += 1
        if cls != CHUNK or self.check_all or self.made <= SAMPLE_FIRST \
                or not self.made % SAMPLE:
            self.sealer.check(cls, name, parts, sealed)
        return sealed


class OpenWorker(Worker):
    """A worker of Openers."""

    def __init__(self, key, *pipes):
        super().__init__(*pipes)
        self.opener = Opener(key)
        self.names = Names(key)

    def block(self, view, at, level):
        name, plain, length = OPEN_BLOCK.unpack_from(view, at)
        at += OPEN_BLOCK.size
        kind, data = self.open(Kid(CHUNK, name, plain),
                               bytes(view[at:at + length]))
        return at + length, OPENED.pack(kind, len(data)), data

    def open(self, kid, body):
        """(PLAIN, content), or what else it is and a text."""
        try:
            return PLAIN, chunk_open(self.opener, self.names, kid, body)
        except Error as e:
            kind = UNCLEAR if isinstance(e, Unclear) else DAMAGED
            text = str(e)
        except Exception as e:          # as in a thread: not to end unheard
            kind, text = UNCLEAR, 'block %s: %s: %s' % (
                kid.name.hex()[:16], type(e).__name__, e)
        return kind, text.encode('utf-8', 'replace')[:OPENED_TEXT]


class Workers:
    """Workers and the memory they share with the process that forks them.

    Make it before any thread.
    """

    nice = 0

    def __init__(self, most, make):
        """So many workers `most`; make(slots, jobs, results) is one."""
        import mmap
        import select
        count = min(most, processors())
        slots = SLOTS * count
        self.slots = mmap.mmap(-1, slots * SLOT)
        self.free = list(range(slots))
        self.workers = set()            # process ids
        jobs, self.give = os.pipe()
        self.take, results = os.pipe()
        self.poll = select.poll()
        self.poll.register(self.take, select.POLLIN)
        # They share what is imported and collected before they are; a
        # collection would write to all of it.
        worker = make(self.slots, jobs, results)
        gc.freeze()
        try:
            for _ in range(count):
                self.fork(worker)
        except OSError:                 # no more processes, or memory
            if not self.workers:
                self.close()
                raise
        finally:
            os.close(jobs)
            os.close(results)

    def fork(self, worker):
        pid = os.fork()
        if not pid:
            self.work(worker)
        self.workers.add(pid)

    def work(self, worker):
        """In the child.  The terminal's signals are for the parent, whose
        end closes the pipe; nothing of the parent's is to be cleaned up here.
        """
        import signal
        status = 1
        try:
            for name in ('SIGINT', 'SIGQUIT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
            gc.disable()
            os.nice(self.nice)
            os.close(self.give)
            os.close(self.take)
            worker.run()
            status = 0
        except OSError:
            pass                        # the parent is gone
        finally:
            os._exit(status)

    def tell(self, slot, count, level):
        """Tell a worker what is in a slot."""
        try:
            os.write(self.give, JOB_MESSAGE.pack(slot, count, level))
        except BrokenPipeError:
            self.check(0)

    def ready(self, seconds):
        """True if a result can be read, waited for that long."""
        return bool(self.poll.poll(1000 * seconds))

    def check(self, flags):
        """Error if a worker has ended: its job would never come back."""
        for pid in self.workers:
            ended, status = os.waitpid(pid, flags)
            if ended:
                self.workers.discard(pid)
                raise Error('a worker process ended by itself (status %d; '
                            'out of memory?)'
                            % os.waitstatus_to_exitcode(status))
        if not self.workers:
            raise Error('the worker processes have ended')

    def failed(self, pos):
        """Raise the Error that a job left at `pos`."""
        length, = U32.unpack_from(self.slots, pos)
        pos += U32.size
        raise Error('a worker process failed: %s'
                    % show(self.slots[pos:pos + length]))

    def close(self):
        """Let the workers end, and wait for that."""
        os.close(self.give)
        self.end()

    def end(self):
        """Wait for the workers, whose pipe is closed."""
        for pid in self.workers:
            os.waitpid(pid, 0)
        os.close(self.take)
        self.slots.close()


class Crew(Workers):
    """The workers of a backup, seen from the process that forked them.

    What add() takes comes back, in whatever order, through `put(sealed,
    *rest)` in a later call of add(), wait() or finish(), in the caller's
    thread.
    """

    nice = WORKERS_NICE

    def __init__(self, key, pad=True, check_all=False, most=WORKERS_MOST):
        sealer = Sealer(key, pad=pad)
        sealer.seal(CHUNK, bytes(32), [b''])        # what they import
        Scanner(cut_key(key))
        super().__init__(most, lambda *pipes: SealWorker(
            sealer, check_all, *pipes))
        self.put = None                 # set by who uses it
        self.level = lambda: None       # of deflate; None: the usual one
        self.jobs = {}                  # slot -> [rest of add(), one a block]
        #                                 or a Scan
        self.key = key
        self.sizes = {}                 # slot -> bytes in it
        self.bytes = 0                  # added and not put yet
        self.slot = None                # being filled
        self.pos = 0                    # in it
        self.batch = []                 # rest of what is in it

    def add(self, cls, name, parts, *rest):
        """Have a block sealed; `parts` are bytes, copied before return."""
        size = JOB_BLOCK.size + sum(map(len, parts)) + U32.size * len(parts)
        if self.batch and (self.pos + size > JOB
                           or len(self.batch) >= JOB_BLOCKS):
            self.flush()
        if self.slot is None:
            while not self.free:
                self.collect()
            self.slot = self.free.pop()
        slots, at = self.slots, self.slot * SLOT + self.pos
        JOB_BLOCK.pack_into(slots, at, name, cls, len(parts))
        at += JOB_BLOCK.size
        struct.pack_into('>%dI' % len(parts), slots, at, *map(len, parts))
        at += U32.size * len(parts)
        for part in parts:
            slots[at:at + len(part)] = part
            at += len(part)
        self.pos += size
        self.bytes += size
        self.batch.append(rest)

    def scan(self, before, data):
        """The Scan of two pieces together, which have room in a slot."""
        while not self.free:
            self.collect()
        slot = self.free.pop()
        at, middle = slot * SLOT, slot * SLOT + len(before)
        scan = Scan(len(before) + len(data), crew=self)
        self.slots[at:middle] = before
        self.slots[middle:at + scan.length] = data
        self.send(slot, scan, scan.length, SCANNING)
        return scan

    def send(self, slot, job, count, level):
        """Have the job in a slot done."""
        self.jobs[slot] = job
        self.tell(slot, count, level)

    def flush(self):
        """Hand over the open slot, and take what is ready."""
        if self.batch:
            self.sizes[self.slot] = self.pos
            level = self.level()
            self.send(self.slot, self.batch, len(self.batch),
                      -1 if level is None else level)
            self.slot, self.pos, self.batch = None, 0, []
        while self.jobs and self.ready(0):
            self.collect()

    def collect(self):
        """Wait for one job; its blocks are put, its hits known."""
        for rest, sealed in self.result():
            self.put(sealed, *rest)

    def result(self):
        """[(rest, sealed)] of the next job that is done; of a Scan none."""
        while not self.ready(1):
            self.check(os.WNOHANG)
        message = os.read(self.take, JOB_RESULT.size)
        if not message:
            self.check(0)
        slot, count = JOB_RESULT.unpack(message)
        batch, pos = self.jobs.pop(slot), slot * SLOT
        size = self.sizes.pop(slot, 0)
        self.free.append(slot)
        self.bytes -= size
        if count == NO_BLOCKS:
            self.failed(pos)
        if isinstance(batch, Scan):
            self.found(batch, pos, count)
            return ()
        blocks = []
        for _ in range(count):
            length, = U32.unpack_from(self.slots, pos)
            pos += U32.size
            blocks.append(self.slots[pos:pos + length])
            pos += length
        return zip(batch, blocks)

    def found(self, scan, pos, count):
        """Take the hits out of a slot; if it has the piece still, since it
        has no room for them, look for them here.
        """
        if count == ALL_HITS:
            scanner = Scanner(cut_key(self.key))
            scan.hits = scanner.hits(self.slots[pos:pos + scan.length])
        else:
            scan.hits = list(HIT.iter_unpack(
                self.slots[pos:pos + count * HIT.size]))

    def wait(self):
        """Have more put; False if nothing was left to put."""
        left = bool(self.batch or self.jobs)
        self.flush()
        if self.jobs:
            self.collect()
        return left

    def finish(self):
        """Have everything put that was added."""
        while self.wait():
            pass

    def drop(self):
        """Forget everything that was added and not put."""
        self.batch, self.bytes, self.pos = [], self.bytes - self.pos, 0
        while self.jobs:
            self.result()


class Openers(Workers):
    """The workers of a restore: chunks go to one of them as they came, and
    come back opened and compared with their names.

    One thread may add() while another collect()s; any may flush().
    """

    def __init__(self, key):
        self.changed = threading.Condition()    # guards all below
        self.jobs = {}                  # slot -> [tags of its blocks]
        self.slot = None                # being filled
        self.pos = 0                    # in it
        self.room = 0                   # what its blocks take, either way
        self.batch = []                 # tags of what is in it
        self.closed = False
        super().__init__(WORKERS_MOST, lambda *pipes: OpenWorker(key, *pipes))

    def add(self, kid, body, tag):
        """Have the BLOCK `body` opened as chunk `kid`; False if it has no
        room: no chunk is so long.
        """
        cost = OPEN_BLOCK.size + max(len(body), kid.plain)
        if cost > JOB:
            return False
        with self.changed:
            # Once closed, the number of the pipe may be that of another file.
            if self.batch and not self.closed and (
                    self.room + cost > JOB or len(self.batch) >= JOB_BLOCKS):
                self.hand_over()
            while self.slot is None and not self.closed:
                if self.free:
                    self.slot = self.free.pop()
                else:
                    self.changed.wait()
            if self.closed:
                raise Error('the worker processes have ended')
            at = self.slot * SLOT + self.pos
            OPEN_BLOCK.pack_into(self.slots, at, kid.name, kid.plain,
                                 len(body))
            at += OPEN_BLOCK.size
            self.slots[at:at + len(body)] = body
            self.pos += OPEN_BLOCK.size + len(body)
            self.room += cost
            self.batch.append(tag)
        return True

    def flush(self):
        """Hand over what was added."""
        with self.changed:
            if self.batch and not self.closed:
                self.hand_over()

    def check(self, flags):
        with self.changed:
            super().check(flags)

    def hand_over(self):
        self.jobs[self.slot] = self.batch
        try:
            self.tell(self.slot, len(self.batch), 0)
        except Error:
            pass                # they have all ended: collect() says so
        self.slot, self.pos, self.room, self.batch = None, 0, 0, []

    def collect(self):
        """[(tag, content or None, Error or None)] of the next job that is
        done, waited for; None after close().
        """
        while not self.ready(1):
            if not self.closed:
                self.check(os.WNOHANG)
        message = os.read(self.take, JOB_RESULT.size)
        if not message:
            if self.closed:
                return None
            self.check(0)
        slot, count = JOB_RESULT.unpack(message)
        with self.changed:
            tags, pos = self.jobs.pop(slot), slot * SLOT
        if count == NO_BLOCKS:
            self.failed(pos)
        found = []
        for tag in tags:
            kind, length = OPENED.unpack_from(self.slots, pos)
            pos += OPENED.size
            data = self.slots[pos:pos + length]
            pos += length
            if kind == PLAIN:
                found.append((tag, data, None))
            else:
                wrong = Unclear if kind == UNCLEAR else CorruptError
                found.append((tag, None, wrong(data.decode(
                    'utf-8', 'replace'))))
        with self.changed:
            self.free.append(slot)
            self.changed.notify_all()
        return found

    def stop(self):
        """Take no more; collect() says when all is done."""
        with self.changed:
            if not self.closed:
                self.closed = True
                os.close(self.give)
                self.changed.notify_all()

    def close(self):
        """Let the workers end, and wait for that; nobody collects now."""
        if not self.slots.closed:
            self.stop()
            self.end()


##############################################################################
# Create: reading files
#
# What is in a file, as chunks of its own or a share of chunks with its
# neighbours.  Knows files and chunks, not pages.
##############################################################################

SHARED_BELOW = 32 * KIB     # shorter files share chunks
READ = MIB                  # of a large file, at once
PAUSED = 64 * KIB           # bytes between two pauses of --disk-pause
LINKS = 100000              # inodes remembered until all names are seen


class Ref:
    """A chunk, by its name."""

    __slots__ = ('name', 'plain')

    def __init__(self, name, plain):
        self.name = name
        self.plain = plain          # bytes


class Content:
    """What is in one file; shared by the names of a hard-linked one."""

    __slots__ = ('extents', 'tree', 'digest', 'size', 'left', 'shared')

    def __init__(self):
        self.extents = []       # (Ref or None for a hole, offset, length, n)
        self.tree = None        # ExtentTree, if there are many
        self.digest = b''
        self.size = 0           # bytes
        self.left = 0           # bytes of it not yet cut into a chunk
        self.shared = False     # its chunks are shared with neighbours


class SharedStream:
    """Small files' contents, concatenated in walk order and cut as one.

    A new stream begins where the owner changes, so that nobody's bytes are
    deflated together with another's.
    """

    def __init__(self, cutter, store):
        self.cutter = cutter
        self.store = store          # Writer.chunk
        self.owner = None
        self.waiting = collections.deque()      # (Content, start), in order
        self.start = 0                          # of the open chunk
        self.end = 0                            # of what was fed

    def add(self, content, data, owner):
        """Take the bytes of one small file of user `owner`."""
        if owner != self.owner:
            self.flush()
            self.owner = owner
        content.left = len(data)
        content.shared = True
        self.waiting.append((content, self.end))
        self.end += len(data)
        for chunk in self.cutter.feed(data):
            self.cut(chunk)

    def flush(self):
        """End the stream; every content handed in is complete then."""
        for chunk in self.cutter.finish():
            self.cut(chunk)

    def wait(self):
        """Until no more is being scanned."""
        for chunk in self.cutter.cut():
            self.cut(chunk)

    def cut(self, chunk):
        """Give a finished chunk to the files whose bytes are in it."""
        ref = self.store(chunk)
        begin, end = self.start, self.start + len(chunk)
        while self.waiting:
            content, start = self.waiting[0]
            stop = start + content.size
            if start >= end:
                break
            low, high = max(start, begin), min(stop, end)
            content.extents.append((ref, low - begin, high - low, 1))
            content.left -= high - low
            if content.left:
                break
            self.waiting.popleft()
        self.start = end


class ExtentTree:
    """The extents of a large file, as lists; flat in memory.

    A list ends after an extent whose chunk's name begins with 8 zero bits,
    at the latest after LIST_MOST.
    """

    def __init__(self, writer):
        self.writer = writer            # has put_index()
        self.last = None                # (Ref, offset, length, repeat)
        self.extents, self.kids, self.numbers = [], [], {}
        self.bytes = 0
        self.lists = []                 # (Kid, bytes) of level 1

    def add(self, extent):
        """Enter the next extent; one like the last only repeats it."""
        last = self.last
        if last and last[0] and extent[0] and last[1:3] == extent[1:3] and \
                last[0].name == extent[0].name:
            self.last = (*last[:3], last[3] + 1)
            return
        self.last = extent
        if last:
            self.write(*last)

    def write(self, ref, offset, length, repeat):
        """Append one extent."""
        ends, number = False, HOLE
        if ref is not None:
            name = ref.name
            number = self.numbers.setdefault(name, len(self.kids))
            if number == len(self.kids):
                self.kids.append(Kid(CHUNK, name, ref.plain, 0))
            self.kids[number].times += repeat
            ends = name[0] == 0
        self.extents.append(EXTENT.pack(number, offset, length, repeat))
        self.bytes += length * repeat
        if ends or len(self.extents) >= LIST_MOST:
            self.end()

    def end(self):
        if self.extents:
            kid = self.writer.put_index(EXTENT_LIST, 1, self.kids,
                                        b''.join(self.extents))
            self.lists.append((kid, self.bytes))
        self.extents, self.kids, self.numbers = [], [], {}
        self.bytes = 0

    def finish(self):
        """(level, Kids) of the top lists so far, at most MOST_EXTENTS."""
        if self.last:
            self.write(*self.last)
        self.last = None
        self.end()
        return tree_raise(self.writer, EXTENT_LIST, 1, self.lists,
                          lambda notes: b''.join(map(U64.pack, notes)), sum)


LIST_MOST = 1024            # kids of one list


def tree_raise(writer, kind, level, rows, pack, merge):
    """Put lists above `rows` of (Kid, note) until MOST_EXTENTS are left.

    `pack(notes)` makes a list's rows part, `merge(notes)` its own note.
    Returns (level, Kids).
    """
    while len(rows) > MOST_EXTENTS:
        level += 1
        above, part, size = [], [], 0
        for number, (kid, note) in enumerate(rows):
            part.append((kid, note))
            size += len(pack([note]))
            if kid.name[0] == 0 or len(part) >= LIST_MOST \
                    or size >= 128 * KIB or number == len(rows) - 1:
                notes = [row[1] for row in part]
                above.append((writer.put_index(
                    kind, level, [row[0] for row in part], pack(notes)),
                    merge(notes)))
                part, size = [], 0
        rows = above
    return level, [row[0] for row in rows]


class FileReader:
    """Reads files into Contents."""

    def __init__(self, writer):
        self.writer = writer
        scanner = Scanner(cut_key(writer.key))
        self.cutter = Cutter(scanner, writer.crew)
        self.shared = SharedStream(Cutter(scanner, writer.crew),
                                   writer.chunk)
        pause = writer.opt.disk_pause
        self.pread = pread_paced(pause / 1000) if pause else pread_exactly
        self.open = None            # Content of the file being read
        self.changed = False        # the last file changed under us
        self.grown = False          # and is longer than it was

    def read(self, fd, st):
        """The Content of the open file `fd`, whose fstat was `st`.

        The length stored is the length read, at most the length it had.
        """
        content = self.open = Content()
        if st.st_size < SHARED_BELOW:
            content = self.read_small(fd, st, content)
        elif st.st_blocks * 512 < st.st_size and self.sparse(fd, st):
            self.read_sparse(fd, st, content)
        else:
            self.read_range(self.from_file(fd), 0, st.st_size, content)
        if content.tree:
            content.tree = content.tree.finish()
        after = os.fstat(fd)
        self.grown = after.st_size > st.st_size
        self.open = None
        self.changed = content.size != st.st_size or (
            after.st_mtime_ns, after.st_ctime_ns, after.st_size) != (
            st.st_mtime_ns, st.st_ctime_ns, st.st_size)
        return content

    def from_file(self, fd):
        """read(size, pos) of a file."""
        return lambda size, pos: self.pread(fd, size, pos)

    def read_input(self, read, size, regions, owner):
        """The Content of a file of `size` bytes that is in another archive,
        of user `owner`.  read(size, pos) gives all that is asked for; only
        `regions`, (pos, size) in order, are no holes.
        """
        content, at = Content(), 0
        if size < SHARED_BELOW:
            return self.small(read(size, 0), owner, content)
        self.open = content
        for start, length in (*regions, (size, 0)):
            if start < at or start + length > size:
                raise CorruptError('a map of holes that makes no sense')
            if start > at:
                self.extent(content, None, 0, start - at)
            at = start + self.read_range(read, start, start + length, content)
        if content.tree:
            content.tree = content.tree.finish()
        self.open = None
        return content

    def read_small(self, fd, st, content):
        """A file for the shared stream, or the Content of an equal one."""
        return self.small(read_exactly(fd, st.st_size), st.st_uid, content)

    def small(self, data, owner, content):
        content.size = len(data)
        if data:
            content.digest = self.writer.names.content(data)
            known = self.writer.small_find(content.digest)
            if known:
                return known
            self.writer.small_note(content)
            self.shared.add(content, data, owner)
        return content

    def read_stream(self, fd):
        """The Content of all that comes out of a pipe, cut as a file of the
        same bytes is.
        """
        content = self.open = Content()
        data = read_exactly(fd, CHUNK_MAX + 1)
        if len(data) < SHARED_BELOW:
            content = self.small(data, os.geteuid(), content)
        elif len(data) <= CHUNK_MAX:
            self.chunk(content, data)
        else:
            self.cutter.drop()
            while data:
                for chunk in self.cutter.feed(data):
                    self.chunk(content, chunk)
                self.writer.step(len(data))
                data = os.read(fd, READ)
            for chunk in self.cutter.finish():
                self.chunk(content, chunk)
        if content.tree:
            content.tree = content.tree.finish()
        self.open = None
        return content

    def sparse(self, fd, st):
        """True if the file system tells of a hole before the end."""
        try:
            return os.lseek(fd, 0, os.SEEK_HOLE) < st.st_size
        except OSError:
            return False

    def read_sparse(self, fd, st, content):
        """Data and holes in turn."""
        pos = 0
        while pos < st.st_size:
            try:
                data = min(os.lseek(fd, pos, os.SEEK_DATA), st.st_size)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                data = st.st_size
            if data > pos:
                self.extent(content, None, 0, data - pos)
            if data >= st.st_size:
                break
            pos = min(os.lseek(fd, data, os.SEEK_HOLE), st.st_size)
            if self.read_range(self.from_file(fd), data, pos,
                               content) < pos - data:
                break                       # it was cut short meanwhile

    def read_range(self, read, start, end, content):
        """Cut bytes `start` to `end` of what read(size, pos) reads; how many
        there were.

        What is no longer than the longest chunk is one chunk, uncut.
        """
        left = end - start
        if left <= CHUNK_MAX:
            data = read(left, start)
            if data:
                self.chunk(content, data)
            return len(data)
        pos = start
        self.cutter.drop()          # what a file that failed may have left
        while pos < end:
            data = read(min(READ, end - pos), pos)
            if not data:
                break
            pos += len(data)
            for chunk in self.cutter.feed(data):
                self.chunk(content, chunk)
            self.writer.step(len(data))
        for chunk in self.cutter.finish():
            self.chunk(content, chunk)
        return pos - start

    def chunk(self, content, data):
        self.extent(content, self.writer.chunk(data), 0, len(data))

    def extent(self, content, ref, offset, length):
        """Append an extent, to the row's own or to lists when many."""
        content.size += length
        if content.tree is None:
            content.extents.append((ref, offset, length, 1))
            if len(content.extents) > MOST_EXTENTS:
                content.tree = ExtentTree(self.writer)
                for extent in content.extents:
                    content.tree.add(extent)
                content.extents = []
        else:
            content.tree.add((ref, offset, length, 1))


# Started as a group with a guard in it, that ends when we do, however that
# happens, and takes the group along: the guard reads from a pipe to us.
GUARDED = """\
exec 3<&0 </dev/null
{ read x; kill -9 0; } <&3 3<&- >/dev/null 2>&1 &
exec 3<&-
exec /bin/sh -c "$1"
"""


class Command:
    """A command whose output is read; nothing of it outlives close()."""

    def __init__(self, text):
        """`text` (bytes) is for the shell."""
        import subprocess
        self.text = text
        guard, self.leash = os.pipe()
        try:
            self.process = subprocess.Popen(
                ['/bin/sh', '-c', GUARDED, 'sh', text], stdin=guard,
                stdout=subprocess.PIPE, start_new_session=True)
        except BaseException as e:
            os.close(self.leash)
            if isinstance(e, (OSError, ValueError)):
                raise UserError('Cannot run command "%s": %s'
                                % (show(path_escape(text)), e)) from None
            raise
        finally:
            os.close(guard)
        self.fd = self.process.stdout.fileno()

    def check(self):
        """Wait for its end; UserError unless that is a good one."""
        status = self.process.wait()
        if status:
            raise UserError('Command "%s" failed: %s' % (
                show(path_escape(self.text)),
                'exit status %d' % status if status > 0
                else 'killed by signal %d' % -status))

    def close(self):
        """End it, and whatever it has started in its group."""
        import signal
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.stdout.close()
        self.process.wait()
        os.close(self.leash)


def read_exactly(fd, size):
    """Up to `size` bytes from `fd`, fewer only at the end of the file."""
    data = os.read(fd, size)
    while len(data) < size:
        more = os.read(fd, size - len(data))
        if not more:
            break
        data += more
    return data


def pread_exactly(fd, size, pos):
    data = os.pread(fd, size, pos)
    while len(data) < size:
        more = os.pread(fd, size - len(data), pos + len(data))
        if not more:
            break
        data += more
    return data


def pread_paced(seconds):
    """pread_exactly() with a pause after each PAUSED bytes."""
    def pread(fd, size, pos):
        parts = []
        while size:
            data = os.pread(fd, min(size, PAUSED), pos)
            if not data:
                break
            parts.append(data)
            pos += len(data)
            size -= len(data)
            time.sleep(seconds)
        return b''.join(parts)

    return pread


##############################################################################
# Create: pages and the archive
#
# Entries become rows, rows become pages; a page whose entries are as they were
# is reused without being read or written.  What makes an entry "as it was" is
# stat_key(); the four ways in which that could lose a file in silence are
# named there.  Uses walk, file reader, memo and transaction.
##############################################################################

PAGE_ENTRIES = 4096
PAGE_KIDS = 4096
PAGE_ROWS = 128 * KIB       # bytes
PAGES_WAITING = 16          # pages held open by the shared stream at most
RACY = 2 * BILLION          # ns: a file this fresh may change unseen
FIRST_TIME = -1 << 63       # ns since 1970: the year 1677
LONGEST_KEY = 60000         # bytes of a member name in the memo
XATTRS_INLINE = 64 * KIB    # bytes of one entry's attributes, all in all
XATTRS_MOST = MIB           # the same, with those that are chunks
XATTRS_CHUNKS = 1024        # of one entry, so that it fits a page
NO_XATTRS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODATA)
LEVEL_SLOW = 6              # of deflate, while the network is what limits
METADATA = 'dry-run-metadata'   # the value of opt.dry_run
FORMAT = b'1'               # part of every profile: rows of another format

STAT_KEY = struct.Struct('>IQqqQQI')


class Page:
    """A page being filled: entries, and what the memo keeps of them."""

    __slots__ = ('entries', 'keys', 'first', 'rows', 'kids', 'bytes',
                 'whole', 'cut')

    def __init__(self, first):
        self.first = first      # member name of the first entry
        self.entries = []       # (Entry, Content or None, xattr Refs)
        self.keys = []          # stat key of each, b'' if it never matches
        self.rows = 0           # bytes of rows, about
        self.kids = 0           # at most so many
        self.bytes = 0          # of files in it
        self.whole = True       # False: next time look at each entry
        self.cut = 0            # entries known to be in finished chunks

    def waits(self):
        """True if bytes of it are not cut into chunks yet."""
        entries = self.entries
        while self.cut < len(entries):
            content = entries[self.cut][1]
            if content is not None and content.left:
                return True
            self.cut += 1
        return False


class KidTable:
    """What a page refers to, each block once."""

    __slots__ = ('kids', 'numbers')

    def __init__(self):
        self.kids = []          # Kid, by number
        self.numbers = {}       # name -> number

    def number(self, name, plain, cls=CHUNK):
        """The number of a kid, which is new with `times` 0."""
        at = self.numbers.get(name)
        if at is None:
            at = self.numbers[name] = len(self.kids)
            self.kids.append(Kid(cls, name, plain, 0))
        return at


class Seen:
    """A page of an earlier run: entries by member name."""

    __slots__ = ('kids', 'rows')

    def __init__(self, body):
        """`body` as Writer.memo_body() packed it; CorruptError if torn."""
        try:
            plain = zlib.decompress(body)
        except zlib.error as e:
            raise CorruptError('memo: %s' % e) from None
        if sha256(plain[32:]) != plain[:32]:
            raise CorruptError('memo: torn row')
        reader = Reader(plain, 'memo')
        reader.take(32)
        keys = [reader.take(reader.u16()) for _ in range(reader.u32())]
        refs = reader.take(reader.u32())
        self.kids = index_unpack(refs, b'').kids
        self.rows = {}
        for key in keys:
            size, = U32.unpack_from(plain, reader.pos)
            length, = U16.unpack_from(plain, reader.pos + 4
                                      + ROW_HEAD.size - 2)
            start = reader.pos + 4 + ROW_HEAD.size
            row = reader.take(4 + size)
            self.rows[plain[start:start + length]] = (key, row)


class Writer:
    """Turns a walk into an archive."""

    def __init__(self, opt, key, crew, sink, cache=None, memo=None):
        """`sink` is a Transaction, or a DryRun that only counts."""
        self.opt = opt
        self.key = key
        self.sink = sink
        self.cache = cache
        self.memo = memo
        self.names = Names(key)
        self.crew = crew                # Crew, closed by who made it
        crew.put, crew.level = self.put, self.level
        self.page_mac = hmac.new(
            hmac.digest(key.k_cut, b'page', 'sha256'), b'', 'sha256')
        self.errors = 0                 # entries that could not be stored
        self.owners = {}                # (uid, gid) -> owner()
        self.keyed = bool(opt.store_atime or opt.rename)
        self.profile = b''
        self.progress = Progress(opt, 'adding')
        self.lines = LongLines(opt)
        self.due = self.checkpoint = None   # see run()
        self.start_over()

    def start_over(self):
        """State of one walk; called again after a Restart."""
        self.errors = 0
        self.linked = {}                    # Entry.link -> name, for -vv
        self.progress.reset()
        self.reader = FileReader(self)
        self.ahead = collections.deque()    # entries of the walk looked at
        self.page = None
        self.waiting = collections.deque()  # full pages, in order
        self.pages = []                     # (Kid, (first, entries, bytes))
        self.kept = False                   # the last is of keep_open()
        self.entries = self.bytes = 0
        self.links = {}                     # (dev, ino) -> [Content, left]
        self.systems = {}                   # st_dev -> ordinal in this run
        self.small = {}                     # digest -> Content, recent
        self.seen = []                      # Seen pages not passed yet
        self.previous = None                # components of the last member
        self.sorted = True
        self.now = time.time_ns()
        # Of what changed after that, another change could go unseen.
        self.fresh = min(self.now, self.opt.snaptime or self.now) - RACY

    # Chunks and index blocks.

    def chunk(self, data):
        """Name a chunk, and have it stored if it is new; its Ref."""
        name, plain = self.names.chunk(data), len(data)
        found = self.sink.claim(name, CHUNK, plain)
        if found is None:
            self.crew.add(CHUNK, name, (data,), name, CHUNK, plain)
        elif isinstance(found, tuple) and found[2] is None:
            self.sink.plains[name] = plain
        return Ref(name, plain)

    def put(self, sealed, name, cls, plain, kids=(), sums=None):
        """A block comes back from the crew, sealed."""
        totals = sums and (plain + sums[0], len(sealed) + sums[1])
        self.sink.put(name, cls, sealed, plain, kids, totals)

    def level(self):
        """Of deflate: as asked, or high while time for that is free."""
        if self.opt.compression is None and self.sink.slow:
            return LEVEL_SLOW
        return self.opt.compression

    def put_index(self, kind, level, kids, rows):
        """Store a page or list unless it is stored; its Kid."""
        digest = self.names.rows(rows)
        refs = index_refs(kind, level, digest, kids)
        name = self.names.index(refs)
        plain = len(refs) + len(rows)
        found = self.sink.claim(name, INDEX, plain)
        if found is None:
            self.crew.add(INDEX, name, (refs, rows), name, INDEX, plain,
                          kids, self.below(kids))
        elif isinstance(found, tuple) and found[4] is None:
            self.sink.known(name, found, plain, kids, self.below(kids))
        return Kid(INDEX, name, plain)

    def below(self, kids):
        """(plain, stored) of all that `kids` name, waited for."""
        sums = self.sink.below(kids)
        while sums is None:
            if not self.crew.wait():
                raise inconsistent()
            sums = self.sink.below(kids)
        return sums

    # Small files seen before.

    def small_find(self, digest):
        """The Content of an equal small file that is stored, or None."""
        known = self.small.get(digest)
        if known:
            return known
        extents = self.sink.small(digest)
        if not extents:
            return None
        content = Content()
        content.digest, content.shared = digest, True
        for name, plain, offset, length in extents:
            if self.usable(name) != plain:
                return None
            content.extents.append((Ref(name, plain), offset, length, 1))
            content.size += length
        return content

    def usable(self, name):
        """Plain length of a stored chunk that may be used, else None."""
        if self.memo and name in self.memo.repack:
            return None
        return self.sink.plain(name)

    def small_note(self, content):
        self.small[content.digest] = content

    def small_save(self, content):
        """Move a finished small file from memory into `pending`."""
        if self.small.pop(content.digest, None) is not None:
            self.sink.add_small(content.digest, small_pack(content.digest, [
                (ref.name, ref.plain, offset, length)
                for ref, offset, length, _ in content.extents]))

    # The walk.

    def run(self, walk, due, checkpoint=None, merge=None):
        """Take in a whole walk.

        Where due() says so, after an entry or within a large file,
        checkpoint() is called, and what it raises ends the run.
        merge(kind, folder, name) takes in what is no file to be walked, and
        yields where that may be asked.
        """
        self.due, self.checkpoint = due, checkpoint
        source = iter(walk)
        while self.look(source, 1):
            steps = (None,)
            if self.ahead[0][3] is None:
                folder, name, kind, _, _ = self.ahead.popleft()
                self.page_end()
                steps = merge(kind, folder, name)
            elif self.page is not None or not self.reuse(source):
                self.page = self.page or Page(self.ahead[0][2])
                self.add(*self.ahead.popleft())
            for _ in steps:
                if due():
                    self.page_end()
                    checkpoint()
        self.page_end()
        self.finish_pages(True)

    def step(self, count):
        """So many bytes more of a large file were read: it may be time for
        a checkpoint, which the page before the file ends.
        """
        self.progress.step(count)
        if self.due():
            self.page_end()
            self.checkpoint()
            self.page = Page(self.progress.path)

    def cut(self):
        """End here; an entry that was not finished is left out."""
        self.page_end()
        self.finish_pages(False)
        self.keep_open()
        self.progress.path = None

    def finish_pages(self, final):
        """Have every page stored that was ended; `final` at the end."""
        self.reader.shared.flush()
        self.settle(0, final)
        self.crew.finish()

    def checkpointed(self):
        """After a checkpoint what was put before it counts as borrowed."""
        self.links.clear()
        self.small.clear()
        for kid, _ in self.pages:
            self.sink.borrow(kid.name)
        if self.kept:
            self.pages.pop()
            self.kept = False

    def keep_open(self):
        """A page without rows names what was sent of the file being read, so
        that it is kept, and known to the next try.
        """
        content, kids = self.reader.open, {}
        if content is None or not content.size:
            return
        if content.tree:
            kids = {kid.name: kid for kid in content.tree.finish()[1]}
        for ref, _, _, _ in content.extents:
            if ref:
                kids[ref.name] = Kid(CHUNK, ref.name, ref.plain)
        self.pages.append((self.put_index(PAGE, 0, list(kids.values()), b''),
                           (self.progress.path, 0, 0)))
        self.kept = True

    def look(self, source, count):
        """Have up to `count` entries in `ahead`; how many there are."""
        ahead = self.ahead
        while len(ahead) < count:
            entry = next(source, None)
            if entry is None:
                break
            ahead.append((*entry, entry[3] and self.stat_key(*entry[2:])))
        return len(ahead)

    def stat_key(self, member, st):
        """What must be equal for an entry to be as it was; b'' for never.

        Never: an mtime or ctime so fresh that the file could be written
        again without a change of either, or what has no room in a key.  Those
        that failed to open, vanished or changed while read get b'' in
        page_add().  Not st_dev (it differs with every mount), nor size, nlink
        and access time of directories; xattrs, ACLs and link targets are
        covered by ctime.
        """
        mtime, ctime, mode = st.st_mtime_ns, st.st_ctime_ns, st.st_mode
        fresh = self.fresh
        if mtime > fresh or ctime > fresh or mtime < FIRST_TIME \
                or ctime < FIRST_TIME or len(member) > LONGEST_KEY:
            return b''
        if stat.S_ISDIR(mode):
            key = STAT_KEY.pack(mode, 0, mtime, ctime, st.st_ino, 0, 0)
        else:
            key = STAT_KEY.pack(mode, st.st_size, mtime, ctime,
                                st.st_ino, st.st_rdev, st.st_nlink)
            if st.st_nlink > 1:
                key += U32.pack(self.system(st.st_dev))
        if self.keyed:
            key += self.stat_more(st)
        return key + self.owner(st)[0] + member

    def stat_more(self, st):
        """What options add to a key: what they make of an entry beyond its
        name.
        """
        more = b''
        if self.opt.store_atime:
            more = b'atime' if stat.S_ISDIR(st.st_mode) else ATIME.pack(
                *divmod(st.st_atime_ns, BILLION))
        if stat.S_ISLNK(st.st_mode) and self.opt.rename \
                and self.opt.rename.links:
            more += self.opt.rename.digest
        return more

    def owner(self, st):
        """(packed, user name, group name), looked up once."""
        found = self.owners.get((st.st_uid, st.st_gid))
        if found is None:
            names = owner_names(st.st_uid, st.st_gid)
            found = (struct.pack('>II', st.st_uid, st.st_gid) +
                     b'%b\0%b\0' % names, *names)
            self.owners[st.st_uid, st.st_gid] = found
        return found

    def system(self, device):
        """Ordinal of a file system in this run."""
        return self.systems.setdefault(device, len(self.systems))

    def reuse(self, source):
        """Take over a page of an earlier run whose entries are unchanged."""
        if not self.memo:
            return False
        best = None
        for row in self.memo.candidates(memo_first(self.ahead[0][2]),
                                        self.profile):
            memo, digest, name, entries, size, final, body = row
            best = best or body
            if digest is None:
                continue
            have = self.look(source, entries + (1 if final else 0))
            if have < entries or (final and have > entries):
                continue
            keys = [entry[4] for _, entry in zip(range(entries), self.ahead)]
            if digest == keys_digest(keys) and not self.memo.stale(memo) \
                    and self.page_reuse(row):
                return True
        if best:
            self.remember(best)
        return False

    def page_reuse(self, row):
        """Enter a page as it is, if it is stored; it passes the walk's end
        of the queue.
        """
        memo, _, name, entries, size, _, _ = row
        claimed = self.sink.plain(name)
        if claimed is None:
            return False
        first = self.ahead[0][2]
        each = self.opt.verbose or self.opt.progress_bytes
        for _ in range(entries):
            entry = self.ahead.popleft()
            self.order(entry[2])
            if each:
                self.begin(*entry[:4])
                self.progress.end()
        if not each:
            self.progress.begin(first)
            self.progress.add(entries, size)
        self.page_refer(Kid(INDEX, name, claimed), (first, entries, size))
        self.sink.add_memo((memo_first(first), self.profile, None, name,
                            entries, size, 0, b'', b'', memo))
        return True

    def page_refer(self, kid, note):
        """Enter a page that is stored: (first member, entries, bytes)."""
        self.entries += note[1]
        self.bytes += note[2]
        self.waiting.append((kid, note))

    def remember(self, body):
        """Keep an earlier page's entries at hand, one by one."""
        try:
            self.seen.append(Seen(body))
        except CorruptError:
            pass
        del self.seen[:-2]

    def order(self, member):
        """Note whether members rise, compared component by component."""
        if self.sorted:
            parts = member.split(b'/')
            if self.previous is not None and parts <= self.previous:
                self.sorted = False
            self.previous = parts

    def begin(self, folder, name, member, st):
        """An entry is taken up: -v and progress."""
        if self.opt.verbose > 1:
            self.say(member, self.outline(folder, name, st))
        elif self.opt.verbose:
            self.say(member)
        self.progress.begin(member, st.st_size if stat.S_ISREG(st.st_mode)
                            else 0)

    def say(self, member, entry=None, ours=True):
        """The line of -v; that of -vv has the `entry`.  If that is not `ours`,
        its link is a number of another archive's.
        """
        line = path_escape(member)
        if entry and self.opt.verbose > 1:
            first = ours and entry.link \
                and self.linked.setdefault(entry.link, member)
            line = self.lines.line(entry, member,
                                   first if first != member else None)
        note('a %s\n' % show(line))

    def outline(self, folder, name, st):
        """What -vv says of an entry, before it is read."""
        entry = Entry()
        self.fill(entry, st)
        if entry.kind == FILE:
            entry.size = st.st_size
        try:
            if entry.kind == SYMLINK:
                entry.target = os.readlink(name, dir_fd=folder.get())
                target_edit(entry, self.opt)
            entry.xattrs = tuple((os.fsencode(name), b'') for name in
                                 os.listxattr(
                self.path(folder, name), follow_symlinks=self.follows(entry)))
        except (AttributeError, OSError):
            pass                # none on this system; or reading says it
        return entry

    def follows(self, entry):
        """True if its name may be a symbolic link, though it is none: one
        that leads nowhere is stored as a link even with -L.
        """
        return entry.kind != SYMLINK and (self.opt.follow_all
                                          or self.opt.follow_operands)

    def path(self, folder, name):
        """A name of what is in an open folder, for calls without dir_fd."""
        return os.path.join(b'/proc/self/fd/%d' % folder.get(), name)

    # Entries.

    def add(self, folder, name, member, st, key):
        """Read one entry into the page."""
        if len(member) > LONGEST_PATH:
            self.report('%s...: path too long' % show(member[:60]))
            self.page.whole = False
            return
        self.order(member)
        self.begin(folder, name, member, st)
        if self.opt.dry_run == METADATA:
            self.count(st)
            return
        old = self.unchanged(member, key)
        try:
            if old:
                self.page_add(*old, key)
            else:
                self.read(folder, name, member, st, key)
            self.progress.end()
        except OSError as e:
            self.report('%s: Cannot read: %s' % (show(member),
                                                 e.strerror or e))
            self.page.whole = False
            self.reader.open = None
        if self.page and self.page_ends(member):
            self.page_end()

    def count(self, st):
        """All that is done with an entry by --dry-run-metadata."""
        self.entries += 1
        if stat.S_ISREG(st.st_mode):
            self.bytes += st.st_size
        self.progress.end()

    def report(self, text):
        """An entry that could not be stored as it should."""
        self.errors += 1
        warn(text)

    def unchanged(self, member, key):
        """(Entry, Content, xattr Refs) from an earlier page, or None."""
        for seen in reversed(self.seen):
            found = seen.rows.get(member)
            if found and key and found[0] == key:
                return self.recall(seen, found[1])
        return None

    def recall(self, seen, row):
        """An earlier row with Refs for its kids; None if one is gone."""
        entry = row_unpack(Reader(row, 'memo'), len(seen.kids))
        return self.referred(entry, seen.kids, self.usable)

    def referred(self, entry, kids, usable):
        """(Entry, Content, xattr Refs) of a stored entry whose page has
        `kids`; None if usable() does not know one of them any more.
        """
        refs = {}

        def ref(number):
            kid = kids[number]
            if number not in refs:
                if usable(kid.name) != kid.plain:
                    raise KeyError
                refs[number] = Ref(kid.name, kid.plain)
            return refs[number]

        try:
            xattrs = [ref(value) for _, value in entry.xattrs
                      if isinstance(value, int)]
            content = None
            if entry.kind == FILE:
                content = Content()
                content.digest, content.size = entry.digest, entry.size
                content.shared = bool(entry.digest)
                content.extents = [
                    (None if kid == HOLE else ref(kid), offset, length, n)
                    for kid, offset, length, n in entry.extents]
                if entry.lists:
                    for number in entry.lists:
                        ref(number)
                    content.tree = (entry.level, [kids[number] for number
                                                  in entry.lists])
        except KeyError:
            return None
        return entry, content, xattrs

    def enter(self, entry, content, xattrs):
        """Append an entry that does not come from the walk."""
        if self.page is None:
            self.page = Page(entry.path)
        self.order(entry.path)
        self.page_add(entry, content, xattrs, b'')
        if self.page_ends(entry.path):
            self.page_end()

    def read(self, folder, name, member, st, key):
        """Open, stat and read one entry; OSError if that fails."""
        entry = Entry()
        entry.path = member
        content, xattrs = None, []
        if stat.S_ISREG(st.st_mode):
            fd = open_at(name, self.open_flags(), folder.get())
            try:
                seen, st = st, os.fstat(fd)
                if not stat.S_ISREG(st.st_mode):
                    raise OSError(errno.ESTALE, 'Changed into something else')
                if key and (seen.st_ctime_ns != st.st_ctime_ns
                            or seen.st_ino != st.st_ino):
                    key = self.stat_key(member, st)
                self.fill(entry, st)
                # Last, as a checkpoint may come between parts of a file.
                content = self.content(fd, st)
                entry.xattrs, xattrs = self.attributes(fd)
            finally:
                os.close(fd)
            entry.size = content.size
            key = self.read_outcome(member, key)
        else:
            self.fill(entry, st)
            if entry.kind == SYMLINK:
                entry.target = os.readlink(name, dir_fd=folder.get())
                target_edit(entry, self.opt)
            try:
                entry.xattrs, xattrs = self.attributes(
                    self.path(folder, name), following=self.follows(entry))
            except OSError as e:
                if entry.kind != DIRECTORY:
                    raise
                # Who may not read a directory still sees what it is.
                self.report('%s: Cannot read extended attributes: %s'
                            % (show(member), e.strerror))
                key = b''
        self.page_add(entry, content, xattrs, key)

    def command(self, text):
        """Store the output of a command, `PATH=COMMAND`, as a file.

        A page of its own, so that those around it are as they were without.
        Yields once it is whole.
        """
        member, _, text = text.partition(b'=')
        if not self.opt.absolute:
            member = member.lstrip(b'/')
        self.order(member)
        self.progress.begin(member)
        if self.opt.verbose == 1:
            self.say(member)
        if self.opt.dry_run != METADATA:
            self.command_read(member, text)
        else:
            self.entries += 1
            self.progress.end()
        yield

    def command_read(self, member, text):
        """Run a command; its output becomes a page."""
        command = Command(text)
        try:
            entry = Entry()
            entry.path = member
            self.fill(entry, os.fstat(command.fd))
            entry.kind, entry.mode, entry.mtime = FILE, 0o600, time.time_ns()
            content = self.reader.read_stream(command.fd)
            command.check()
        finally:
            command.close()
        entry.size = content.size
        if self.opt.verbose > 1:            # its size is known only now
            self.say(member, entry)
        self.progress.end(content.size)
        self.page = Page(member)
        self.page_add(entry, content, (), b'')
        self.page_end()

    def open_flags(self):
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        if not (self.opt.follow_all or self.opt.follow_operands):
            flags |= os.O_NOFOLLOW
        if self.opt.noatime:
            flags |= NOATIME
        return flags

    def read_outcome(self, member, key):
        """The key of a file just read: none if it changed meanwhile."""
        if self.reader.grown and not self.opt.quiet:
            warn('%s: file may have grown while being archived'
                 % show(member))
        return b'' if self.reader.changed else key

    def fill(self, entry, st):
        """The fields that come from stat."""
        entry.kind = KIND_OF_MODE[stat.S_IFMT(st.st_mode)]
        entry.mode = stat.S_IMODE(st.st_mode)
        entry.uid, entry.gid = st.st_uid, st.st_gid
        _, entry.uname, entry.gname = self.owner(st)
        entry.mtime = st.st_mtime_ns
        if self.opt.store_atime:
            entry.atime = st.st_atime_ns
        if entry.kind in (CHARDEV, BLOCKDEV):
            entry.device = (os.major(st.st_rdev), os.minor(st.st_rdev))
        if st.st_nlink > 1 and entry.kind != DIRECTORY:
            entry.link = (st.st_ino, self.system(st.st_dev))

    def attributes(self, where, following=True):
        """(xattrs for a row, Refs of long values) of a descriptor or path.

        OSError for any that is there and cannot be read.
        """
        options = {} if isinstance(where, int) else {
            'follow_symlinks': following}
        try:
            names = os.listxattr(where, **options)
        except AttributeError:
            return (), []           # none on this system
        except OSError as e:
            if e.errno not in NO_XATTRS and (
                    isinstance(where, int) or os.path.isdir('/proc/self/fd')):
                raise
            return (), []
        return self.attributes_keep(self.values(where, names, options)) \
            if names else ((), [])

    def values(self, where, names, options):
        """(name, value) of the attributes that are still there."""
        for name in sorted(map(os.fsencode, names)):
            try:
                yield name, os.getxattr(where, name, **options)
            except OSError as e:
                if e.errno not in NO_XATTRS:
                    raise

    def attributes_keep(self, pairs):
        """(xattrs for a row, Refs of long values) of (name, value) pairs."""
        xattrs, refs, size = [], [], 0
        for name, value in pairs:
            size += len(name) + len(value)
            if size > XATTRS_MOST or len(refs) >= XATTRS_CHUNKS \
                    or len(name) > 255:
                raise OSError(errno.E2BIG, 'Too many extended attributes')
            if len(value) > INLINE_XATTR or size > XATTRS_INLINE:
                refs.append(self.chunk(value))
                value = len(refs) - 1
            xattrs.append((name, value))
        return tuple(xattrs), refs

    def content(self, fd, st):
        """The Content of a file; read once for all names of an inode."""
        inode = (st.st_dev, st.st_ino)
        known = st.st_nlink > 1 and self.links.get(inode)
        if known and known[2] == (st.st_size, st.st_mtime_ns, st.st_ctime_ns):
            known[1] -= 1
            if not known[1]:
                del self.links[inode]
            self.reader.changed = self.reader.grown = False
            return known[0]
        content = self.reader.read(fd, st)
        if st.st_nlink > 1 and not self.reader.changed:
            if len(self.links) >= LINKS:
                self.links.pop(next(iter(self.links)))
            self.links[inode] = [content, st.st_nlink - 1, (
                st.st_size, st.st_mtime_ns, st.st_ctime_ns)]
        return content

    # Pages.

    def page_add(self, entry, content, xattrs, key):
        """Append an entry; a page too full for it is ended first."""
        page = self.page
        rows = ROW_HEAD.size + 50 + len(entry.path) + len(entry.target) + \
            len(entry.uname) + len(entry.gname)
        for name, value in entry.xattrs:
            rows += len(name) + 6 + (
                len(value) if isinstance(value, bytes) else 4)
        kids = len(xattrs)
        if content is not None:
            # Of a small file it is one or two, and never more than three.
            extents = 2 if content.shared else len(content.extents)
            kids += extents + (len(content.tree[1]) if content.tree else 0)
            rows += EXTENT.size * extents
        if page.entries and (page.rows + rows > PAGE_ROWS
                             or page.kids + kids > PAGE_KIDS):
            self.page_end()
            page = self.page = Page(entry.path)
        page.entries.append((entry, content, xattrs))
        page.keys.append(key)
        page.rows += rows
        page.kids += kids
        page.bytes += entry.size
        if not key:
            page.whole = False

    def page_ends(self, member):
        """True if a page ends after this member: 1 in 512, by keyed hash."""
        if len(self.page.entries) >= PAGE_ENTRIES:
            return True
        mac = self.page_mac.copy()
        mac.update(member)
        digest = mac.digest()
        return digest[0] == 0 and digest[1] < 128

    def page_end(self):
        """Close the page; it waits until its chunks are cut and named."""
        page, self.page = self.page, None
        if page and page.entries:
            self.waiting.append(page)
            if len(self.waiting) > PAGES_WAITING:
                self.reader.shared.flush()
            self.settle(4)
            if len(self.waiting) >= PAGES_WAITING:
                # Where the next flush is must not depend on the workers.
                self.reader.shared.wait()
                self.settle(4)

    def settle(self, most, final=False):
        """Finish full pages in order until `most` are left, if they can be.

        Reused pages wait in the same queue, so that order is kept.
        """
        while self.waiting:
            page = self.waiting[0]
            if isinstance(page, Page):
                if len(self.waiting) <= most or page.waits():
                    return
                row = self.page_make(page, final
                                     and len(self.waiting) == 1)
            else:
                row = page
            self.waiting.popleft()
            self.pages.append(row)

    def page_make(self, page, final):
        """Rows and references of a page; stored, and noted for the memo."""
        table, links, rows = KidTable(), set(), []
        kids = table.kids
        for entry, content, xattrs in page.entries:
            if xattrs:
                self.page_xattrs(entry, xattrs, table)
            if content is not None:
                self.page_content(entry, content, table,
                                  entry.link not in links)
            if entry.link:
                links.add(entry.link)
            rows.append(row_pack(entry))
        rows = b''.join(rows)
        kid = self.put_index(PAGE, 0, kids, rows)
        self.entries += len(page.entries)
        self.bytes += page.bytes
        self.sink.add_memo((
            memo_first(page.first), self.profile,
            keys_digest(page.keys) if page.whole else None, kid.name,
            len(page.entries), page.bytes, int(final),
            memo_body(page.keys, kids, rows), self.page_uses(page), None))
        return kid, (page.first, len(page.entries), page.bytes)

    def page_xattrs(self, entry, xattrs, table):
        """Give the Refs of long attributes their kid numbers."""
        refs = iter(xattrs)
        values = []
        for name, value in entry.xattrs:
            if isinstance(value, int):
                ref = next(refs)
                value = table.number(ref.name, ref.plain)
                table.kids[value].times += 1
            values.append((name, value))
        entry.xattrs = tuple(values)

    def page_content(self, entry, content, table, first):
        """Give the Refs of a file's content their kid numbers; `first` of
        the names of its inode in the page, which is the one that counts.
        """
        kids, entry.digest = table.kids, content.digest
        entry.lists = entry.extents = ()
        if content.tree:
            entry.level, lists = content.tree
            entry.lists = tuple(table.number(kid.name, kid.plain, INDEX)
                                for kid in lists)
            for at in entry.lists:
                kids[at].times += first
            return
        extents, shared = [], content.shared
        for ref, offset, length, repeat in content.extents:
            at = HOLE
            if ref is not None:
                at = table.number(ref.name, ref.plain)
                if shared:
                    kids[at].times = 1
                elif first:
                    kids[at].times += repeat
            extents.append((at, offset, length, repeat))
        entry.extents = extents
        if shared and not content.left:
            self.small_save(content)

    def page_uses(self, page):
        """How many bytes of each shared chunk this page uses, packed."""
        live = {}
        for _, content, _ in page.entries:
            if content is not None and content.shared:
                for ref, offset, length, _ in content.extents:
                    live.setdefault(ref.name, {})[offset] = length
        return b''.join(USE.pack(name, sum(ranges.values()))
                        for name, ranges in live.items())

    # The archive.

    def record(self, base, title, series, complete=True):
        """Put the lists and the record for what was taken in so far.

        `title` is the archive's name, with .part for a checkpoint;
        `series` the name the series comes from.
        """
        level, kids = tree_raise(
            self, PAGE_LIST, 0, self.pages, list_notes_pack,
            lambda notes: (notes[0][0], sum(note[1] for note in notes),
                           sum(note[2] for note in notes)))
        record = Record()
        record.machine = self.key.machine
        record.title = title
        record.archive = self.names.archive(title)
        record.series = self.names.series(series)
        record.lineage, record.tid = self.sink.lineage, self.sink.tid
        record.base = base
        record.complete, record.sorted = complete, self.sorted
        record.level, record.kids = level, kids
        record.entries, record.bytes = self.entries, self.bytes
        record.pages = len(self.pages)
        record.created = self.opt.creationtime or max(
            0, int(self.now // BILLION))        # a clock may be anywhere
        record.argv = argv_cut(self.opt.argv)
        record.host = os.fsencode(os.uname().nodename)
        parts = record_pack(record, self.key)
        record.name = self.names.record(parts[0])
        plain = record_plain(parts)
        self.sink.claim(record.name, RECORD, plain)
        self.crew.add(RECORD, record.name, parts, record.name, RECORD, plain,
                      kids, self.below(kids))
        self.crew.finish()
        return record


def keys_digest(keys):
    """One digest over the stat keys of a page; None if one never matches."""
    if not all(keys):
        return None
    return sha256(b'\0'.join(keys))


def memo_body(keys, kids, rows):
    """What the memo keeps of a page: stat keys, references, rows."""
    refs = index_refs(PAGE, 0, bytes(32), kids)
    plain = b''.join([U32.pack(len(keys))]
                     + [U16.pack(len(key)) + key for key in keys]
                     + [U32.pack(len(refs)), refs, rows])
    return zlib.compress(sha256(plain) + plain, 1)


def owner_names(uid, gid):
    """Names of a user and a group, empty where there is none."""
    import grp
    import pwd
    try:
        uname = os.fsencode(pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        uname = b''
    try:
        gname = os.fsencode(grp.getgrgid(gid).gr_name)
    except (KeyError, OverflowError):
        gname = b''
    return uname[:255], gname[:255]


ARGV_MOST = 128000          # bytes of the command line kept in an archive


def argv_cut(argv):
    """The creating command line, cut with a warning if it is very long."""
    kept, size = [], 0
    for arg in argv:
        size += U32.size + len(arg)
        if size > ARGV_MOST:
            warn('command line is too long to be stored whole')
            break
        kept.append(arg)
    return kept


class DryRun(Sink):
    """A sink that counts what a Transaction would store, and stores nothing.
    """

    lineage = tid = bytes(16)

    def put(self, name, cls, sealed, plain, kids=(), totals=None):
        own = Own(cls, plain, len(sealed))
        own.sums = totals or (plain, len(sealed))
        self.own.set(name, own)
        self.new[0] += plain
        self.new[1] += len(sealed)

    def meet(self, kid, below):
        """Where no cache directory knows the block, it counts as it is
        before compression.
        """
        if self.own.get(kid.name) or \
                self.cache and self.cache.find(kid.name):
            return
        own = Own(kid.cls, kid.plain, kid.plain)
        own.sums = (kid.plain + below,) * 2
        self.own.set(kid.name, own)

    def add_small(self, digest, extents):
        self.smalls[digest] = extents

    def add_memo(self, row):
        pass


##############################################################################
# Fetch: blocks in order, many in flight
#
# Who restores knows every block long before its bytes are needed, so a window
# of them is always on its way, whatever the round trip.  A pool of threads
# receives, opens and compares each block with its name; nothing unchecked
# comes out.  Reads only; knows entries as far as they name blocks.
##############################################################################

FETCH_WINDOW = 8 * MIB      # stored bytes asked for and not yet consumed
FETCH_BATCH = MIB           # asked for at once
FETCH_NAMES = 512           # in one GET
FETCH_KEEP = 16 * MIB       # decoded shared chunks kept
SEAL_COST = 512             # bytes a stored block may have over its plain ones
INDEX_WINDOW = 2 * MIB      # a dozen pages of usual size
RECORD_GUESS = 4 * KIB      # bytes of an archive record
THREADS = 4                 # beside the decoders: two channels while one is
                            # left for the other, a collector, a spare


class Slot:
    """A block asked for: `get()` waits for its plain content."""

    __slots__ = ('kid', 'keep', 'done', 'value', 'error', 'fetcher')

    def __init__(self, fetcher, kid, keep=False):
        self.fetcher = fetcher
        self.kid = kid
        self.keep = keep        # into the cache: others will want it too
        self.done = False       # value or error is set
        self.value = None       # bytes, IndexBlock or Record
        self.error = None       # an Error

    def get(self):
        """Plain bytes of a chunk, or an IndexBlock, or a Record.

        CorruptError if the block is missing, damaged or another one;
        RemoteError if the server cannot be reached any more.
        """
        if not self.done:
            self.fetcher.wait(self)
        if self.error:
            raise self.error
        return self.value


def openers_make(key):
    """Openers, made before any thread; None where no process can be had, or
    where these would leave no room for our threads, which the system counts
    like processes: a restore goes on without.
    """
    try:
        openers = Openers(key)
    except OSError:
        return None
    if threads_fit(THREADS + decoders()):
        return openers
    openers.close()
    return None


def threads_fit(count):
    """True if so many threads can be had at once."""
    over, threads = threading.Event(), []
    try:
        for _ in range(count):
            threads.append(thread_start(over.wait))
    except Error:
        return False
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return True


def decoders():
    """Threads of a Fetcher without openers; openers want no more of them."""
    return max(2, os.cpu_count() or 1)


class Fetcher:
    """Blocks of one machine, by name; close() it after use.  Chunks are
    opened by the Openers given, if any, which are closed with it.
    """

    def __init__(self, remote, openers=None):
        self.remote = remote
        self.openers = openers
        self.key = remote.key
        self.opener = Opener(remote.key)
        self.names = Names(remote.key)
        # A pruning key opens what a block refers to, and nothing else.
        self.view = GET_WHOLE if self.key.data_priv else GET_REFS
        self.changed = threading.Condition()    # guards all below
        self.channel = None         # where requests go; None while it is lost
        self.unsent = []            # slots not asked for yet
        self.unsent_bytes = 0
        self.waiting = 0            # who waits for a slot
        self.requests = collections.deque()     # (id or None, deque of slots)
        self.flying = {}            # name -> slot not done yet
        self.kept = collections.OrderedDict()   # name -> slot done, shared
        self.kept_bytes = 0
        self.fetched = 0            # blocks asked for
        self.fatal = None           # why nothing more will come
        self.closed = False
        self.turn = threading.Lock()            # one thread at a time listens
        self.threads = []
        self.collector = None       # the thread that waits for openers

    # What the reader calls.

    def want(self, kid, keep=False):
        """The Slot of block `kid`; it is asked for soon, or by flush()."""
        with self.changed:
            slot = self.flying.get(kid.name)
            if slot is None:
                slot = self.kept.get(kid.name)
                if slot:
                    self.kept.move_to_end(kid.name)
            if slot:
                slot.keep = slot.keep or keep
                if slot.kid.plain != kid.plain or slot.kid.cls != kid.cls:
                    return self.refuse(kid)
                return slot
            slot = Slot(self, kid, keep)
            self.flying[kid.name] = slot
            self.unsent.append(slot)
            self.unsent_bytes += kid.plain + SEAL_COST
            if self.unsent_bytes >= FETCH_BATCH:
                self.send()
        return slot

    def flush(self):
        """Ask now for everything wanted."""
        if self.unsent:
            with self.changed:
                self.send()

    def get(self, kid):
        """The content of one block, now."""
        return self.want(kid).get()

    def ahead(self, jobs, window=FETCH_WINDOW):
        """(slot or None, tag) for each (kid or None, keep, tag) of `jobs`.

        Takes jobs from their iterator as far ahead as `window` bytes of
        blocks allow; whoever does not want a block need not get() it.
        """
        pending = collections.deque()       # (cost, slot, tag)
        used, refill, last = 0, window - min(FETCH_BATCH, window // 4), None
        jobs = iter(jobs)
        while True:
            if used <= refill and len(pending) <= 4096:
                while jobs and used < window and len(pending) < 8192:
                    job = next(jobs, None)
                    if job is None:
                        jobs = None
                        break
                    kid, keep, tag = job
                    if kid is None:
                        pending.append((0, None, tag))
                    elif last and last.kid is kid:
                        pending.append((0, last, tag))
                    else:
                        last = self.want(kid, keep)
                        cost = kid.plain + SEAL_COST
                        used += cost
                        pending.append((cost, last, tag))
                self.flush()
            if not pending:
                return
            cost, slot, tag = pending.popleft()
            yield slot, tag
            used -= cost

    def wait(self, slot):
        """Until `slot` is done."""
        self.flush()
        with self.changed:
            self.waiting += 1
            if self.openers:
                self.openers.flush()
            while not slot.done:
                self.changed.wait()
            self.waiting -= 1

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if self.openers:
            self.openers.stop()
            if self.collector:
                self.collector.join()
            self.openers.close()

    # Asking.  All of these are called with `changed` held.

    def refuse(self, kid):
        slot = Slot(self, kid)
        slot.done = True
        slot.error = CorruptError('block %s: two lengths or classes for one '
                                  'name' % kid.name.hex()[:16])
        return slot

    def send(self):
        """Post GETs for what is unsent; a lost channel is for the threads."""
        if self.fatal:
            for slot in self.unsent:
                self.finish(slot, None, self.fatal)
            self.unsent = []
        if not self.unsent:
            return
        if not self.threads:
            self.start()
        if self.channel is None:
            return
        slots, self.unsent, self.unsent_bytes = self.unsent, [], 0
        for at in range(0, len(slots), FETCH_NAMES):
            self.post(slots[at:at + FETCH_NAMES])
        self.changed.notify_all()

    def post(self, slots):
        """One GET; without a channel it waits in `requests` for recover()."""
        rid = None
        try:
            if self.channel:
                rid = self.channel.post(
                    GET, self.view, U16.pack(len(slots)),
                    *[slot.kid.name for slot in slots])
        except Error:
            self.channel = None
        self.requests.append((rid, collections.deque(slots)))
        self.fetched += len(slots)

    def start(self):
        """Connect, and start the threads; one that works is enough."""
        self.channel = self.remote.connect()
        if self.openers and not self.collector:
            self.collector = thread_start(self.collect)
        for _ in range(1 if self.openers else decoders()):
            try:
                self.threads.append(thread_start(self.work))
            except Error:
                if not self.threads:
                    raise

    def finish(self, slot, value, error):
        """Give `slot` its value or error, and wake who waits for it.  The
        first stands: what follows from an end must not hide its cause.
        """
        if slot.done:
            return
        slot.value, slot.error = value, error
        slot.done = True
        self.flying.pop(slot.kid.name, None)
        if slot.keep and error is None:
            self.kept[slot.kid.name] = slot
            self.kept_bytes += slot.kid.plain
            while self.kept_bytes > FETCH_KEEP:
                _, old = self.kept.popitem(last=False)
                self.kept_bytes -= old.kid.plain
        self.changed.notify_all()

    # The threads: one listens, the others decode; with openers there is one
    # that listens, and one that takes what they have opened.

    def work(self):
        """A thread: receive a block, let the next one listen, decode."""
        while True:
            with self.turn:
                slot, body = self.receive()
            if slot is None:
                return
            try:
                if self.openers and slot.kid.cls == CHUNK \
                        and self.openers.add(slot.kid, body, slot):
                    continue
                value, error = self.decode(slot.kid, body), None
            except Error as e:
                value, error = None, e
            except Exception as e:      # a thread must not die unheard
                value, error = None, Unclear('block %s: %s: %s' % (
                    slot.kid.name.hex()[:16], type(e).__name__, e))
            with self.changed:
                self.finish(slot, value, error)

    def collect(self):
        """The thread that takes what the openers have done."""
        try:
            while True:
                found = self.openers.collect()
                if found is None:
                    return
                with self.changed:
                    for slot, value, error in found:
                        self.finish(slot, value, error)
        except Exception as e:          # a thread must not die unheard
            with self.changed:
                self.fatal = e if isinstance(e, Error) else Error(
                    'Out of memory' if isinstance(e, MemoryError) else
                    'the worker processes: %s: %s' % (type(e).__name__, e))
                for slot in list(self.flying.values()):
                    self.finish(slot, None, self.fatal)
            self.openers.stop()

    def receive(self):
        """The next (slot, BLOCK body); (None, None) when closed."""
        while True:
            with self.changed:
                while not self.closed and not self.requests:
                    if self.openers:
                        self.openers.flush()    # nothing joins it for now
                    self.changed.wait()
                if self.closed:
                    return None, None
                rid, slots = self.requests[0]
                channel = self.channel
            try:
                if rid is None or channel is None:
                    raise ChannelLost('Connection lost')
                if self.openers and self.waiting and not channel.ready(rid):
                    self.openers.flush()
                kind, body = channel.next(rid)
            except Error as e:
                self.recover(e)
                continue
            if kind == BLOCK and slots:
                return slots.popleft(), body
            if kind == ERROR and slots:
                self.missing(slots, rid, refusal(body))
            elif kind != BUSY:
                self.ended(slots, rid)

    def missing(self, slots, rid, error):
        """An ERROR in a block's place.

        One that says no more than that the block is not there leaves the
        rest of the request alone.  Any other may have ended the request, so
        what is left of it is asked again: the worst that can cost is a
        batch received twice.
        """
        with self.changed:
            slot = slots.popleft()
            lost = CorruptError if error.code == E_NOBLOCK else Unclear
            if error.code != E_FUNDS:       # else nothing is wrong with it
                error = lost('block %s is missing: %s' % (
                    slot.kid.name.hex()[:16], error))
            self.finish(slot, None, error)
            if lost is Unclear:
                self.requests.popleft()
                if self.channel:
                    self.channel.forget(rid)
                if slots:
                    self.post(list(slots))

    def ended(self, slots, rid):
        """OK: nothing may be left to come."""
        with self.changed:
            self.requests.popleft()
            if self.channel:
                self.channel.forget(rid)
            for slot in slots:
                self.finish(slot, None, CorruptError(
                    'block %s was left out by the server'
                    % slot.kid.name.hex()[:16]))

    def recover(self, error):
        """Connect again and ask for what is outstanding; else give up."""
        with self.changed:
            self.channel = None
            slots = [slot for _, rest in self.requests for slot in rest]
            self.requests.clear()
        try:
            if not isinstance(error, ChannelLost):
                raise error
            channel = self.remote.connect()
        except Error as e:
            with self.changed:
                self.fatal = e
                for slot in slots:
                    self.finish(slot, None, e)
                self.send()
            return
        with self.changed:
            self.channel = channel
            self.unsent = slots + self.unsent
            self.fetched -= len(slots)
            self.send()

    def decode(self, kid, body):
        """The content of block `kid` in a BLOCK's `body`, name compared."""
        if kid.cls == CHUNK:
            return chunk_open(self.opener, self.names, kid, body)
        parts = self.opener.open(kid.cls, kid.name, block_named(kid, body),
                                 self.view == GET_REFS)
        if kid.cls == INDEX:
            name_check(kid, self.names.index(parts[0]))
            return self.index(kid, *parts)
        name_check(kid, self.names.record(parts[0]))
        return record_unpack(parts, kid.name, self.key)

    def index(self, kid, refs, rows=None):
        """An IndexBlock; without its rows for a key that cannot open them."""
        block = index_unpack(refs, kid.name)
        if rows is None:
            return block
        if self.names.rows(rows) != block.digest:
            raise CorruptError('index block %s: rows are not those its name '
                               'says' % kid.name.hex()[:16])
        block.rows = rows
        return block


# Archives by name.


def record_kid(name):
    return Kid(RECORD, name, RECORD_GUESS)


def archive_find(remote, live, name, opt, fetcher=None):
    """The Record of archive `name` (bytes), found in the checked list `live`.

    UserError if there is none; CorruptError if the record is not the one
    the history signed.
    """
    archive = Names(remote.key).archive(name)
    if archive not in live:
        raise Missing(name)
    own = fetcher or Fetcher(remote)
    try:
        record = own.get(record_kid(live[archive][0]))
    finally:
        if fetcher is None:
            own.close()
    record_check(record, archive, live[archive])
    return record


def record_check(record, archive, link):
    """CorruptError unless `record` is the one `link` of the history means."""
    if record.archive != archive or (link[2] == COMPLETE
                                     and not record.complete):
        raise CorruptError('archive record %s is not the one the history '
                           'names' % record.name.hex()[:16])


# Pages and entries.


def archive_pages(fetcher, record, wanted=None, bad=None):
    """The pages of an archive in order, each an IndexBlock.

    With `wanted`, a set of paths, and a sorted archive, only pages that can
    hold one of them or something below it.  `bad(error)` is called for an
    index block that cannot be read and the rest goes on; without it the
    CorruptError is raised.
    """
    kids = record.kids
    paths = wanted and record.sorted and wanted_keys(wanted)
    if paths:
        kids = kids_search(fetcher, kids, record.level, paths, bad)
    return leaves(fetcher, kids, record.level, paths, bad)


def leaves(fetcher, kids, level, paths, bad):
    """The pages below `kids`, which are lists of `level` (0: pages)."""
    for slot, _ in fetcher.ahead(((kid, bool(paths), None) for kid in kids),
                                 INDEX_WINDOW):
        try:
            block = index_get(slot, PAGE_LIST if level else PAGE, level)
            below = level and list_picked(block, paths)
        except CorruptError as e:
            if bad is None:
                raise
            bad(e)
            continue
        if level:
            yield from leaves(fetcher, below, level - 1, paths, bad)
        else:
            yield block


def index_get(slot, kind, level):
    """The IndexBlock in `slot`, if it is of the kind and level expected."""
    if slot.kid.cls != INDEX:
        raise CorruptError('block %s: an index block was expected'
                           % slot.kid.name.hex()[:16])
    block = slot.get()
    if block.kind != kind or block.level != level:
        raise CorruptError('index block %s: wrong kind or level'
                           % block.name.hex()[:16])
    return block


def wanted_keys(wanted):
    """The places of paths in a sorted archive: as given, and after './'."""
    keys = [path.split(b'/') for path in wanted]
    return sorted(keys + [[b'.'] + key for key in keys if key != [b'.']])


def list_picked(block, paths):
    """The kids of a list of pages that can hold one of `paths`."""
    if not paths:
        return block.kids
    firsts = [note[0].split(b'/') for note in list_notes(block)]
    picked = []
    for number, kid in enumerate(block.kids):
        after = firsts[number + 1] if number + 1 < len(firsts) else None
        if any(first_before(firsts[number], key)
               and (after is None or after >= key) for key in paths):
            picked.append(kid)
    return picked


def first_before(first, key):
    """True if `key`, or something below it, can come at `first` or later."""
    return first[:len(key)] <= key


def kids_search(fetcher, kids, level, paths, bad):
    """Those of a record's kids that can hold one of `paths`.

    A record has no notes of first members, so the few kids it has are
    searched by halves; with many paths reading all of them is cheaper.
    """
    if len(paths) * max(1, len(kids)).bit_length() >= len(kids):
        return kids
    firsts = {}

    def first(number):
        if number not in firsts:
            slot = fetcher.want(kids[number], True)
            block = index_get(slot, PAGE_LIST if level else PAGE, level)
            firsts[number] = (list_notes(block)[0][0] if level else
                              next(page_rows(block)).path).split(b'/')
        return firsts[number]

    picked = set()
    try:
        for key in paths:
            start = bisect(len(kids), lambda n: first(n) < key)
            end = bisect(len(kids), lambda n: first_before(first(n), key))
            picked.update(range(max(0, start - 1), end))
    except (CorruptError, StopIteration, IndexError):
        return kids             # reading them in order tells which is bad
    return [kids[number] for number in sorted(picked)]


def bisect(count, below):
    """How many of 0..count-1 are `below`, true ones coming first."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if below(middle):
            low = middle + 1
        else:
            high = middle
    return low


def archive_entries(fetcher, record, wanted=None):
    """(Entry, its page) for every entry of an archive, in order."""
    for page in archive_pages(fetcher, record, wanted):
        for entry in page_rows(page):
            yield entry, page


ROW = struct.Struct('>IBBHIIqIQH')      # a row's length and its head


def page_rows(page):
    """What page_entries gives, three times as fast.

    Rows of plain files in one extent, and of directories, are taken apart
    here; every other row, and each that is odd, goes the long way.
    """
    rows, kids, pos = page.rows, len(page.kids), 0
    limit, chunk = len(rows), CEILING['chunk']
    reader = Reader(rows, 'page %s' % page.name.hex()[:16])
    unpack, unpack_extent = ROW.unpack_from, EXTENT.unpack_from
    while pos < limit:
        entry, at = Entry(), pos + ROW.size
        try:
            (length, entry.kind, flags, entry.mode, entry.uid, entry.gid,
             seconds, nanos, entry.size, size) = unpack(rows, pos)
            end = pos + 4 + length
            entry.mtime = seconds * BILLION + nanos
            entry.path = path = rows[at:at + size]
            at += size + 1
            size = rows[at - 1]
            entry.uname = rows[at:at + size]
            at += size + 1
            size = rows[at - 1]
            entry.gname = rows[at:at + size]
            at += size
            good = path and entry.mode <= 0o7777 and end <= limit \
                and 0 not in path
            if entry.kind == FILE and not flags & ~HAS_DIGEST:
                if flags:
                    entry.digest = rows[at:at + 16]
                    at += 16
                count = rows[at] << 8 | rows[at + 1]
                at += 2
                if count == 1 and good:
                    kid, offset, length, repeat = extent = unpack_extent(
                        rows, at)
                    at += 20
                    good = kid < kids and length and \
                        offset + length <= chunk and \
                        length * repeat == entry.size
                    entry.extents = (extent,)
                else:
                    good = good and not count and not entry.size
            else:
                good = good and entry.kind == DIRECTORY and not flags
        except (struct.error, IndexError):
            good = False
        if not good or at != end:
            reader.pos = pos
            entry = row_unpack(reader, kids)
            end = reader.pos
        pos = end
        yield entry


def page_paths(page):
    """(kind, path) of every entry of a page: all that a plain -t needs."""
    rows, pos, unpack = page.rows, 0, ROW.unpack_from
    try:
        while pos < len(rows):
            row = unpack(rows, pos)
            at = pos + ROW.size
            yield row[1], rows[at:at + row[9]]
            pos += 4 + row[0]
    except struct.error:
        pos = -1
    if pos != len(rows):
        raise CorruptError('page %s: malformed' % page.name.hex()[:16])


# The content of an entry.


def entry_jobs(fetcher, entry, page):
    """(kid or None, keep, (offset, length, repeat)) for every extent."""
    keep = bool(entry.digest)
    if entry.lists:
        kids = [page.kids[number] for number in entry.lists]
        yield from list_jobs(fetcher, kids, entry.level)
        return
    for number, offset, length, repeat in entry.extents:
        kid = None if number == HOLE else page.kids[number]
        if kid and kid.cls != CHUNK:
            raise CorruptError('page %s: content that is no chunk'
                               % page.name.hex()[:16])
        yield kid, keep or (kid and kid.times > 1), (offset, length, repeat)


def list_jobs(fetcher, kids, level):
    """The same for the extents in the list blocks `kids`."""
    for slot, _ in fetcher.ahead(((kid, False, None) for kid in kids),
                                 INDEX_WINDOW):
        block = index_get(slot, EXTENT_LIST, level)
        if level > 1:
            yield from list_jobs(fetcher, block.kids, level - 1)
            continue
        for number, offset, length, repeat in list_extents(block):
            kid = None if number == HOLE else block.kids[number]
            if kid and kid.cls != CHUNK:
                raise CorruptError('list %s: content that is no chunk'
                                   % block.name.hex()[:16])
            yield kid, kid and kid.times > 1, (offset, length, repeat)


def entry_extents(fetcher, entry, page):
    """(Kid or None for a hole, offset, length, repeat) of an entry."""
    for kid, _, extent in entry_jobs(fetcher, entry, page):
        yield (kid,) + extent


def entry_content(fetcher, entry, page):
    """(slot or None, (offset, length, repeat)) of an entry, fetched ahead."""
    return fetcher.ahead(entry_jobs(fetcher, entry, page))


def piece(slot, offset, length):
    """`length` bytes from `offset` of the chunk in `slot`."""
    data = slot.get()
    if offset + length > len(data):
        raise CorruptError('block %s: an extent reaches over its end'
                           % slot.kid.name.hex()[:16])
    if length == len(data):
        return data
    return memoryview(data)[offset:offset + length]


##############################################################################
# Extract: files made again, never outside the target
#
# Every name is resolved one component at a time from an open directory, and
# no symbolic link is ever followed on the way: whatever an archive says, and
# whoever changes the target meanwhile, nothing outside it is touched (but with
# -P).  A file is new each time, so what was linked or open elsewhere is left
# alone; it has its final time only when it has all of its content.
##############################################################################

OPEN_PLACES = 128           # directories on the way down held open
LINKS_KEPT = 100000         # hard-linked files remembered
FULL = (errno.ENOSPC, errno.EDQUOT)
SPARSE_BLOCK = 4 * KIB
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
CREATE_FLAGS = (os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                | os.O_CLOEXEC)
INODE_FLAGS = getattr(os, 'O_PATH', os.O_RDONLY | os.O_NONBLOCK) \
    | os.O_NOFOLLOW | os.O_CLOEXEC
END = object()              # after the extents of a member of many


class EntryError(Error):
    """This entry cannot be extracted; the others can."""


def truncated(record):
    """1, said on stderr, if the archive is one that was cut short."""
    if record.complete:
        return 0
    warn('Truncated input file')
    warn('%s ends where its creation was interrupted; entries in it: %d'
         % (show(record.title), record.entries))
    return 1


def unmatched(patterns):
    """How many operands nothing matched; each is said on stderr."""
    missed = patterns.unmatched()
    for pattern in missed:
        warn('%s: Not found in archive' % show(pattern))
    return len(missed)


def path_edit(path, opt):
    """`path` after -s and --strip-components; None if nothing is left."""
    if opt.rename:
        path = opt.rename(path)
    if opt.strip_components and path:
        words = path.split(b'/', opt.strip_components)
        path = words[-1] if len(words) > opt.strip_components else b''
    return path or None


def umask_read():
    """The process's umask, not changed even for a moment if possible."""
    try:
        with open('/proc/self/status', 'rb') as file:
            for line in file:
                if line.startswith(b'Umask:'):
                    return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def target_open(opt):
    """A descriptor on the directory to extract into: -C, --chroot."""
    fd = os.open('.', DIRECTORY_FLAGS)
    for directory in opt.directories:
        try:
            below = os.open(directory, DIRECTORY_FLAGS, dir_fd=fd)
        except OSError as e:
            raise UserError('Cannot change to directory %s: %s'
                            % (show(directory), e.strerror)) from None
        finally:
            os.close(fd)
        fd = below
    if opt.chroot:
        try:
            os.fchdir(fd)
            os.chroot('.')
        except OSError as e:
            os.close(fd)
            raise UserError('Cannot change the root directory (--chroot): %s'
                            % e.strerror) from None
    return fd


# Directories on the way down.


class Place:
    """A directory between the target and the entry at hand, held open."""

    __slots__ = ('name', 'fd', 'ident', 'entry', 'xattrs', 'born', 'inherits',
                 'path', 'made')

    def __init__(self, name, fd, status):
        self.name = name
        self.fd = fd            # or -1: deep in the stack, opened by '..'
        self.ident = (status.st_dev, status.st_ino)
        self.entry = None       # whose mode and times it gets when it is left
        self.xattrs = ()        # (name, value) likewise
        self.born = None        # (uid, gid) of files made in it, once known
        self.inherits = False   # modes in it come out changed by its ACL
        self.path = b''         # of entry, for messages
        self.made = False       # by us, so that it is not kept by -k


class Descent:
    """The stack of directories from the target to where we are.

    `leave(place)` is called for each one that has an entry, before it is
    closed.
    """

    def __init__(self, root, opt, leave):
        self.opt = opt
        self.leave = leave
        place = Place(b'', root, os.fstat(root))
        place.inherits = acl_inherited(root)
        self.stack = [place]

    def enter(self, parts, entry=False):
        """The Place at `parts`, made where it is missing.

        `entry`: the archive says that it is a directory.
        """
        stack, same = self.stack, 0
        for place, part in zip(stack[1:], parts):
            if place.name != part:
                break
            same += 1
        while len(stack) > same + 1:
            self.pop()
        for number in range(same, len(parts)):
            last = entry and number + 1 == len(parts)
            stack.append(self.step(stack[-1], parts[number], last))
            if len(stack) > OPEN_PLACES:
                self.rest(stack[-OPEN_PLACES])
        return stack[-1]

    def step(self, above, name, entry):
        """The Place `name` in `above`."""
        made = False
        if entry:
            made = self.make(above, name, 0o700)
        try:
            fd = self.open(above, name)
        except FileNotFoundError:
            made = self.make(above, name, 0o777)
            fd = self.open(above, name)
        except OSError as e:
            if e.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            self.blocked(above, name, entry, e)
            made = self.make(above, name, 0o700 if entry else 0o777)
            fd = self.open(above, name)
        place = Place(name, fd, os.fstat(fd))
        place.inherits = above.inherits if made else acl_inherited(fd)
        place.made = made
        return place

    def make(self, above, name, mode):
        try:
            os.mkdir(name, mode, dir_fd=above.fd)
        except FileExistsError:
            return False
        return True

    def open(self, above, name):
        """A descriptor on directory `name`, no symbolic link."""
        flags = DIRECTORY_FLAGS
        if not self.opt.absolute:
            flags |= os.O_NOFOLLOW
        try:
            return os.open(name, flags, dir_fd=above.fd)
        except PermissionError:
            # We may pass through a directory that we may not list.
            if not hasattr(os, 'O_PATH'):
                raise
            return os.open(name, flags | os.O_PATH, dir_fd=above.fd)

    def blocked(self, above, name, entry, error):
        """Take away what stands where a directory must be, or raise."""
        status = os.stat(name, dir_fd=above.fd, follow_symlinks=False)
        link = stat.S_ISLNK(status.st_mode)
        if self.opt.keep_old and entry:
            raise EntryError(os.strerror(errno.EEXIST))
        if not entry and not (link and self.opt.unlink_first):
            if link:
                raise EntryError('Cannot extract through symlink %s'
                                 % show(path_escape(name)))
            raise error
        os.unlink(name, dir_fd=above.fd)

    def pop(self):
        """Leave the innermost directory."""
        place = self.stack.pop()
        try:
            above = self.stack[-1]
            if above.fd < 0:
                self.wake(above, place)
            if place.entry:
                self.leave(place)
        finally:
            os.close(place.fd)

    def rest(self, place):
        """Close a directory far above."""
        if place.fd >= 0 and place is not self.stack[0]:
            os.close(place.fd)
            place.fd = -1

    def wake(self, above, place):
        """Open `above` again, from the directory in it that we leave."""
        fd = os.open(b'..', DIRECTORY_FLAGS, dir_fd=place.fd)
        status = os.fstat(fd)
        above.fd = fd
        if (status.st_dev, status.st_ino) != above.ident:
            raise EntryError('%s was moved meanwhile' % show(place.name))

    def find(self, parts):
        """A new descriptor on the directory at `parts`, nothing made."""
        fd = os.dup(self.stack[0].fd)
        flags = DIRECTORY_FLAGS
        if not self.opt.absolute:
            flags |= os.O_NOFOLLOW
        for part in parts:
            try:
                below = os.open(part, flags, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def close(self):
        """Leave everything."""
        while len(self.stack) > 1:
            self.pop()
        root = self.stack[0]
        if root.entry:
            self.leave(root)
        os.close(root.fd)


def acl_inherited(fd):
    """True if files made in directory `fd` get an ACL from it."""
    if not hasattr(os, 'getxattr'):
        return False
    try:
        os.getxattr(fd, ACLS[1])
    except OSError:
        return False
    return True


# What an entry has besides its content.


class Owners:
    """User and group numbers by name, as this machine has them."""

    def __init__(self, numeric):
        import grp              # here, since --chroot comes later
        import pwd
        self.numeric = numeric
        self.user, self.group = pwd.getpwnam, grp.getgrnam
        self.users = {}         # (name, id) -> id here
        self.groups = {}

    def uid(self, entry):
        key = (entry.uname, entry.uid)
        if key not in self.users:
            self.users[key] = self.find(self.user, *key)
        return self.users[key]

    def gid(self, entry):
        key = (entry.gname, entry.gid)
        if key not in self.groups:
            self.groups[key] = self.find(self.group, *key)
        return self.groups[key]

    def find(self, lookup, name, number):
        """The number `name` has here; else the one it had there."""
        if self.numeric or not name:
            return number
        try:
            return lookup(os.fsdecode(name))[2]
        except (KeyError, ValueError):
            return number


class Dresser:
    """Gives what has been made its owner, mode, attributes and times.

    A refused owner is an EntryError, raised once all the rest is done.
    """

    def __init__(self, opt):
        root = os.geteuid() == 0
        self.perms = root if opt.perms is None else opt.perms
        self.own = root if opt.own is None else opt.own
        self.times = not opt.no_mtime
        self.mask = umask_read()
        self.owners = Owners(opt.numeric_owner)
        self.now = time.time_ns()
        self.said = set()       # kinds of attribute warned about
        # Where descriptors have names, also after --chroot; -1: nowhere.
        self.names = -1
        if hasattr(os, 'O_PATH') and os.path.isdir('/proc/self/fd'):
            self.names = os.open('/proc/self/fd', os.O_PATH | os.O_CLOEXEC)

    def close(self):
        if self.names >= 0:
            os.close(self.names)

    def mode(self, entry):
        """The mode without special bits."""
        return entry.mode & 0o777 & (~0 if self.perms else ~self.mask)

    def special_bits(self, entry, status, refused):
        """The set-id and sticky bits it may have, given its owner."""
        if not self.perms or not entry.mode & 0o7000:
            return 0
        if not refused and (self.own or self.same_owner(status, entry)):
            return entry.mode & 0o7000
        return entry.mode & 0o1000 if stat.S_ISDIR(status.st_mode) else 0

    def owner(self, what, entry, **at):
        """Give it its owner; or the EntryError to raise at the end."""
        uid, gid = self.owners.uid(entry), self.owners.gid(entry)
        try:
            os.chown(what, uid, gid, **at)
        except OSError as e:
            return EntryError('Cannot set owner %d:%d: %s'
                              % (uid, gid, e.strerror))
        return None

    def file(self, fd, place, entry, xattrs):
        """Dress the file that was just made in `place`; fd is on it."""
        refused = None
        if self.own:
            if place.born is None:
                status = os.fstat(fd)
                place.born = (status.st_uid, status.st_gid)
            if place.born != (self.owners.uid(entry),
                              self.owners.gid(entry)):
                refused = self.owner(fd, entry)
        mode = self.mode(entry)
        if entry.mode & 0o7000:
            mode |= self.special_bits(entry, os.fstat(fd), refused)
        if mode > 0o777 or mode & self.mask or place.inherits:
            os.fchmod(fd, mode)
        if xattrs and self.perms:
            self.attributes(fd, xattrs)
        if self.times:
            self.stamp(fd, entry)
        if refused:
            raise refused

    def directory(self, place):
        """Dress a directory that is being left."""
        entry, fd = place.entry, place.fd
        refused = self.own and self.owner(fd, entry)
        os.fchmod(fd, self.mode(entry)
                  | self.special_bits(entry, os.fstat(fd), refused))
        if place.xattrs and self.perms:
            self.attributes(fd, place.xattrs)
        if self.times:
            self.stamp(fd, entry)
        if refused:
            raise refused

    def special(self, place, name, entry, xattrs):
        """Dress a symbolic link, fifo or device, by name, following none."""
        at = {'dir_fd': place.fd, 'follow_symlinks': False}
        refused = self.own and self.owner(name, entry, **at)
        if entry.kind != SYMLINK and (
                entry.mode & 0o7000 or self.mode(entry) & self.mask
                or place.inherits):
            self.mode_by_path(place, name, entry, refused)
        if xattrs and self.perms and os.path.isdir('/proc/self/fd'):
            self.attributes(b'/proc/self/fd/%d/%b' % (place.fd, name),
                            xattrs, follow_symlinks=False)
        if self.times:
            self.stamp(name, entry, **at)
        if refused:
            raise refused

    def mode_by_path(self, place, name, entry, refused):
        """chmod of what must not be opened; O_PATH keeps it from moving."""
        if self.names < 0:
            status = os.stat(name, dir_fd=place.fd, follow_symlinks=False)
            os.chmod(name, self.mode(entry) | self.special_bits(
                entry, status, refused), dir_fd=place.fd)
            return
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC,
                     dir_fd=place.fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISLNK(status.st_mode):
                os.chmod('%d' % fd, self.mode(entry) | self.special_bits(
                    entry, status, refused), dir_fd=self.names)
        finally:
            os.close(fd)

    def same_owner(self, status, entry):
        """True if it has the owner it is stored with, without our help."""
        return (status.st_uid, status.st_gid) == (self.owners.uid(entry),
                                                  self.owners.gid(entry))

    def stamp(self, what, entry, **at):
        atime = self.now if entry.atime is None else entry.atime
        os.utime(what, ns=(atime, entry.mtime), **at)

    def attributes(self, what, xattrs, **at):
        """Set extended attributes; what this user or place cannot have is
        said once, since it would be said for every file."""
        if not hasattr(os, 'setxattr'):
            return
        for name, value in xattrs:
            try:
                os.setxattr(what, name, value, **at)
            except OSError as e:
                if e.errno not in (errno.ENOTSUP, errno.EPERM, errno.EACCES):
                    raise
                kind = name.split(b'.')[0]
                if kind not in self.said:
                    self.said.add(kind)
                    warn('Cannot set extended attributes %s.*: %s'
                         % (show(path_escape(kind)), e.strerror))


def content_ident(entry, page):
    """What is equal for two names of one file."""
    if entry.digest:
        content = entry.digest
    elif entry.lists:
        content = b''.join(page.kids[number].name for number in entry.lists)
    else:
        content = b''.join(
            (b'' if extent[0] == HOLE else page.kids[extent[0]].name)
            + EXTENT.pack(0, *extent[1:]) for extent in entry.extents)
    return (entry.kind, entry.size, entry.mtime, entry.target, entry.device,
            sha256(content))


def inode_state(status):
    """What only the same file, untouched since, has."""
    return status.st_dev, status.st_ino, status.st_ctime_ns


class Member:
    """An entry on its way from the plan to the disk."""

    __slots__ = ('entry', 'page', 'path', 'extent', 'many', 'lazy')

    def __init__(self, entry, page, path):
        self.entry = entry
        self.page = page
        self.path = path        # after -s and --strip-components
        self.extent = None      # its only one; comes with its slot
        self.many = False       # its extents follow, up to END
        self.lazy = False       # probably not needed: fetched when it is


class Extractor:
    """Extracts the entries of one archive; run() once."""

    def __init__(self, fetcher, record, opt):
        self.fetcher = fetcher
        self.record = record
        self.opt = opt
        self.patterns = Patterns(opt.exclude, opt.include, opt.operands,
                                 opt.fast_read)
        self.dresser = None
        self.lines = LongLines(opt)
        self.names = Namer()
        self.output = Output(1) if opt.json else None
        self.descent = None
        self.head = None        # raw directory part self.place stands for
        self.place = None
        self.errors = self.made = self.passed = self.bytes = 0
        self.warned = False     # of leading '/'
        self.seen = set()       # link ids planned
        self.links = collections.OrderedDict()  # link id -> first name
        self.later = {}         # parts of left directories -> Place
        # Directories get their times as soon as no entry can be in them.
        self.ordered = record.sorted and not (opt.rename or
                                              opt.strip_components)
        self.careful = opt.keep_old or opt.keep_newer or opt.resume_extract
        self.progress = Progress(opt, 'extracting')

    def run(self):
        """Extract everything selected; the number of errors."""
        self.dresser = Dresser(self.opt)
        self.descent = Descent(target_open(self.opt), self.opt, self.leave)
        stream = self.fetcher.ahead(self.plan())
        try:
            for slot, member in stream:
                if member is END or not isinstance(member, Member):
                    continue        # the rest of one that failed
                self.member(slot, member, stream)
        finally:
            self.finish()
            self.dresser.close()

    # The plan, which runs ahead of the disk.

    def plan(self):
        """(kid, keep, tag) for Fetcher.ahead: each Member, then extents."""
        for page in archive_pages(self.fetcher, self.record,
                                  self.patterns.literals(), self.bad):
            try:
                for entry in page_rows(page):
                    if not self.selected(entry):
                        if self.opt.fast_read and self.patterns.includes \
                                and not self.patterns.missed:
                            return
                        continue
                    path = path_edit(entry.path, self.opt)
                    if path is not None:
                        target_edit(entry, self.opt)
                        yield from self.jobs(Member(entry, page, path))
            except CorruptError as e:
                self.bad(e)

    def selected(self, entry):
        if self.opt.newer and not self.opt.newer(entry):
            return False
        return not self.patterns.any or self.patterns.selected(entry.path)

    def jobs(self, member):
        """The jobs of one member."""
        entry, page = member.entry, member.page
        if entry.kind != FILE or not entry.size:
            yield None, False, member
            return
        if self.unlikely(member):
            member.lazy = True
            yield None, False, member
            return
        if len(entry.extents) == 1:
            (kid, keep, extent), = entry_jobs(self.fetcher, entry, page)
            member.extent = extent
            yield kid, keep, member
            return
        member.many = True
        yield None, False, member
        try:
            for job in entry_jobs(self.fetcher, entry, page):
                if member.lazy:         # it failed: do not fetch the rest
                    break
                yield job
        except CorruptError as e:
            yield None, False, e
        yield None, False, END

    def unlikely(self, member):
        """True if the content is probably not needed; a guess only."""
        link = member.entry.link
        if link:
            if link in self.seen:
                return True
            if len(self.seen) < LINKS_KEPT:
                self.seen.add(link)
        if self.opt.interactive:
            return True
        if not self.careful:
            return False
        try:
            status = os.stat(member.path.lstrip(b'/'), follow_symlinks=False,
                             dir_fd=self.descent.stack[0].fd)
            return self.keeps(status, member.entry)
        except (OSError, ValueError):
            return False
        except EntryError:
            return True

    # One member.

    def member(self, slot, member, stream):
        """Extract one; what goes wrong with it is said and counted."""
        message = None
        self.progress.begin(member.path)
        try:
            done = (not self.opt.interactive or ask(b'extract', member.path)) \
                and self.extract(slot, member, stream)
        except (EntryError, CorruptError) as e:
            message = str(e)
        except OSError as e:
            message = e.strerror or str(e)
            if e.errno in FULL:
                raise UserError('%s: %s' % (show(path_escape(member.path)),
                                            message)) from None
        except (ValueError, OverflowError) as e:
            message = str(e)
        self.progress.end(member.entry.size)
        if member.many:
            self.skip(member, stream)
        if message is not None:
            self.complain(member.path, message)
        elif done:
            self.extracted(member)
        else:
            self.passed += 1
            if self.opt.json and self.opt.verbose:
                self.tell(member, 'skipped')

    def skip(self, member, stream):
        """Pass over what is left of a member's extents."""
        member.lazy, member.many = True, False
        for _, extent in stream:
            if extent is END:
                return

    def extracted(self, member):
        """Count one that is done, and say so."""
        entry, path = member.entry, member.path
        self.made += 1
        self.bytes += entry.size
        if not self.opt.verbose:
            return
        first = entry.link and self.names.name(entry, member.page, path)
        if self.opt.json:
            self.tell(member, 'extracted', first)
        elif self.opt.verbose > 1:
            self.say(b'x', self.lines.line(entry, path, first))
        else:
            slash = b'/' if entry.kind == DIRECTORY else b''
            self.say(b'x', self.lines.escape(path) + slash)

    def tell(self, member, status, first=None):
        """An entry as JSON, with what became of it."""
        self.output.put(json_line(dict(
            json_entry(member.entry, member.path, first), status=status)))
        self.output.tick()

    def say(self, *words):
        """A line of -v."""
        if self.opt.null_output:
            say(b'\0\0'.join(words), b'\0')
        else:
            say(b' '.join(words))

    def complain(self, path, message):
        """What went wrong with one entry."""
        self.errors += 1
        if self.opt.json:
            say_json({'type': 'error', 'path': path,
                      'message': os.fsencode(message)})
        elif self.opt.null_output:
            self.say(*[b'x'][:self.opt.verbose], path, os.fsencode(message))
        else:
            self.say(b'%b%b: %b' % (b'x ' if self.opt.verbose else b'',
                                    path_escape(path), os.fsencode(message)))

    def summary(self):
        """The last line of JSON."""
        self.output.put(json_line({
            'type': 'summary', 'extracted': self.made,
            'skipped': self.passed, 'bytes': self.bytes,
            'errors': self.errors}))
        self.output.flush()

    def bad(self, error):
        """Something of the archive itself cannot be read."""
        self.errors += 1
        warn('%s; the entries it holds are lost' % error)

    def content(self, slot, member, stream):
        """(slot or None, (offset, length, repeat)) of a member."""
        if member.extent:
            yield slot, member.extent
        elif member.many:
            for slot, extent in stream:
                if extent is END:
                    member.many = False
                    return
                if isinstance(extent, Error):
                    raise extent
                yield slot, extent
                self.progress.step(extent[1] * extent[2])
        elif member.entry.size:
            yield from entry_content(self.fetcher, member.entry, member.page)

    def extract(self, slot, member, stream):
        """Make one entry; raises whatever is in the way.  False if what is
        there stays."""
        entry, path = member.entry, member.path
        if entry.kind == DIRECTORY:
            self.directory(member)
            return True
        place, name = self.locate(path)
        if self.careful and self.kept(place, name, entry):
            return False
        if entry.link and entry.link in self.links \
                and self.link(place, name, member):
            return True
        xattrs = entry.xattrs and self.values(member)
        if entry.kind == FILE:
            self.file(place, name, member, xattrs,
                      self.content(slot, member, stream))
        else:
            self.make(place, name, entry)
            self.dresser.special(place, name, entry, xattrs)
            if entry.link:
                self.remember(member, name, os.stat(
                    name, dir_fd=place.fd, follow_symlinks=False))
        return True

    def parts(self, path):
        """The components of `path`, or EntryError."""
        parts = path.split(b'/')
        if parts[0] == b'' and not self.opt.absolute and not self.warned:
            self.warned = True
            if not self.opt.quiet:
                warn('Removing leading \'/\' from member names')
        absolute = self.opt.absolute and path.startswith(b'/')
        parts = [part for part in parts if part not in (b'', b'.')]
        if b'..' in parts and not self.opt.absolute:
            raise EntryError('Path contains \'..\'')
        return [b'/'] + parts if absolute else parts

    def locate(self, path):
        """(Place, name in it) for an entry that is no directory."""
        head, _, name = path.rpartition(b'/')
        if head == self.head and name not in (b'', b'.', b'..') \
                and (head or not path.startswith(b'/')):
            return self.place, name
        parts = self.parts(path)
        if not parts or parts[-1] == b'..':
            raise EntryError('Names a directory')
        self.head = None
        self.place = self.descent.enter(parts[:-1])
        self.head = head
        return self.place, parts[-1]

    def directory(self, member):
        """Make a directory, for now with our own access to it."""
        parts = self.parts(member.path)
        self.head = None
        xattrs = member.entry.xattrs and self.values(member)
        place = self.descent.enter(parts, entry=True)
        self.head, self.place = member.path, place
        if self.opt.keep_old and not place.made:
            return
        place.entry, place.xattrs = member.entry, xattrs
        place.path = member.path
        # Without these bits nothing can be made in it; leave() sets all.
        mode = os.fstat(place.fd).st_mode
        if mode & 0o700 != 0o700:
            try:
                self.unshut(place, stat.S_IMODE(mode) | 0o700)
            except OSError:
                pass            # what cannot be made in it will say so

    def unshut(self, place, mode):
        """Change the mode of a directory, and hold it open for more than
        passing through, if that was all we could.
        """
        try:
            os.fchmod(place.fd, mode)
        except OSError as e:
            if e.errno != errno.EBADF:
                raise
            os.chmod('/proc/self/fd/%d' % place.fd, mode)
            fd = os.open('.', DIRECTORY_FLAGS, dir_fd=place.fd)
            os.close(place.fd)
            place.fd = fd

    def values(self, member):
        """The extended attributes, long values fetched."""
        return [(name, self.fetcher.get(member.page.kids[value])
                 if isinstance(value, int) else value)
                for name, value in member.entry.xattrs]

    def keeps(self, status, entry):
        """True if what is there stays; EntryError if that is an error."""
        if self.opt.resume_extract and stat.S_ISREG(status.st_mode) \
                and status.st_size == entry.size \
                and int(status.st_mtime_ns // BILLION) \
                == entry.mtime // BILLION:
            return True
        if self.opt.keep_old:
            raise EntryError(os.strerror(errno.EEXIST))
        return self.opt.keep_newer and status.st_mtime_ns >= entry.mtime

    def kept(self, place, name, entry):
        try:
            status = os.stat(name, dir_fd=place.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return self.keeps(status, entry)

    def clear(self, place, name):
        """Take away what has the name of an entry that is no directory."""
        try:
            os.unlink(name, dir_fd=place.fd)
        except (IsADirectoryError, PermissionError) as e:
            try:
                os.rmdir(name, dir_fd=place.fd)
            except NotADirectoryError:
                raise e from None

    def file(self, place, name, member, xattrs, content):
        """Make a regular file."""
        entry, mode = member.entry, self.dresser.mode(member.entry)
        first = None
        if member.extent:               # nothing is touched if it is lost
            slot, extent = next(content)
            first = slot and piece(slot, *extent[:2])
        try:
            fd = os.open(name, CREATE_FLAGS, mode, dir_fd=place.fd)
        except FileExistsError:
            self.clear(place, name)
            fd = os.open(name, CREATE_FLAGS, mode, dir_fd=place.fd)
        try:
            try:
                if first is not None and member.extent[2] == 1 \
                        and not self.opt.sparse_out:
                    write_all(fd, first)
                elif member.extent:
                    self.fill(fd, entry, [(slot, member.extent)])
                else:
                    self.fill(fd, entry, content)
            except OSError:
                self.clear(place, name)
                raise
            self.dresser.file(fd, place, entry, xattrs)
            if entry.link:
                self.remember(member, name, os.fstat(fd))
        finally:
            os.close(fd)

    def fill(self, fd, entry, content):
        """Write content; holes stay holes.

        What is damaged becomes a hole too, so that the rest is saved, and a
        CorruptError at the end.
        """
        at, hole, damage = 0, False, None
        for slot, (offset, length, repeat) in content:
            data = None
            if slot:
                try:
                    data = piece(slot, offset, length)
                except CorruptError as e:
                    damage = damage or e
            if data is None:
                at += length * repeat
                os.lseek(fd, at, os.SEEK_SET)
                hole = True
                continue
            for _ in range(repeat):
                hole = self.put(fd, data)
            at += length * repeat
        if hole:
            os.ftruncate(fd, at)
        if damage:
            raise CorruptError('%s; zeros stand in its place' % damage)
        if at != entry.size:
            raise CorruptError('Holds %d of %d bytes' % (at, entry.size))

    def put(self, fd, data):
        """Write `data`; True if it ended in a hole."""
        if not self.opt.sparse_out:
            write_all(fd, data)
            return False
        hole, view = False, memoryview(data)
        for at in range(0, len(view), SPARSE_BLOCK):
            block = view[at:at + SPARSE_BLOCK]
            hole = not any(bytes(block).lstrip(b'\0')[:1])
            if hole:
                os.lseek(fd, len(block), os.SEEK_CUR)
            else:
                write_all(fd, block)
        return hole

    def make(self, place, name, entry):
        """Make a symbolic link, fifo or device."""
        try:
            self.make_once(place, name, entry)
        except FileExistsError:
            self.clear(place, name)
            self.make_once(place, name, entry)

    def make_once(self, place, name, entry):
        mode = self.dresser.mode(entry)
        if entry.kind == SYMLINK:
            os.symlink(entry.target, name, dir_fd=place.fd)
        elif entry.kind == FIFO:
            os.mkfifo(name, mode, dir_fd=place.fd)
        elif os.geteuid() != 0:
            raise EntryError('Only root can make a device')
        else:
            kind = stat.S_IFCHR if entry.kind == CHARDEV else stat.S_IFBLK
            os.mknod(name, mode | kind, os.makedev(*entry.device),
                     dir_fd=place.fd)

    # Hard links: names of one file, each with all of its content.

    def remember(self, member, name, status):
        self.links[member.entry.link] = [
            content_ident(member.entry, member.page),
            [place.name for place in self.descent.stack[1:]], name,
            inode_state(status)]
        if len(self.links) > LINKS_KEPT:
            self.links.popitem(last=False)

    def link(self, place, name, member):
        """Link to the first name made of this file, if it is still there;
        False if the content has to be written instead."""
        ident, parts, first, state = self.links[member.entry.link]
        here = [above.name for above in self.descent.stack[1:]]
        if ident != content_ident(member.entry, member.page) \
                or (parts, first) == (here, name):
            return False
        fds = []
        try:
            fds.append(self.descent.find(parts))
            # Held open, its inode number can be no other file's.
            fds.append(os.open(first, INODE_FLAGS, dir_fd=fds[0]))
            if inode_state(os.fstat(fds[1])) != state:
                return False
            self.link_make(fds[0], first, place, name)
            made = os.fstat(fds[1])
            if not os.path.samestat(made, os.stat(
                    name, dir_fd=place.fd, follow_symlinks=False)):
                return False
            self.links[member.entry.link][3] = inode_state(made)
            return True
        except OSError:
            return False
        finally:
            for fd in fds:
                os.close(fd)

    def link_make(self, source, first, place, name):
        for _ in range(2):
            try:
                os.link(first, name, src_dir_fd=source, dst_dir_fd=place.fd,
                        follow_symlinks=False)
                return
            except FileExistsError:
                self.clear(place, name)

    # Directories get their modes and times last.

    def leave(self, place):
        """A directory is left: now, or, in an archive without order, when
        everything is done."""
        if self.ordered:
            self.dress(place)
            return
        parts = tuple(above.name for above in self.descent.stack[1:])
        if place is not self.descent.stack[0]:
            parts += (place.name,)
        self.later[parts] = place

    def dress(self, place):
        try:
            self.dresser.directory(place)
        except (OSError, EntryError, OverflowError, ValueError) as e:
            self.complain(place.path, getattr(e, 'strerror', None) or str(e))

    def finish(self):
        """Modes and times of directories, deepest first."""
        self.head = None
        try:
            root = os.dup(self.descent.stack[0].fd)
            self.descent.close()
            self.descent = Descent(root, self.opt, self.dress)
            for parts in sorted(self.later, key=len, reverse=True):
                place = self.later[parts]
                try:
                    fd = self.descent.find(parts)
                except OSError:
                    continue            # replaced by something else
                try:
                    place.fd = fd
                    self.dress(place)
                finally:
                    os.close(fd)
            self.descent.close()
        except EntryError as e:
            self.errors += 1
            warn(str(e))


# The modes.


def mode_extract(remote, opt):
    """-x: the number of errors met."""
    remote.apart = opt.chroot
    fetcher = Fetcher(remote, openers_make(remote.key))
    try:
        live = history_live(remote, opt)
        record = archive_find(remote, live, opt.names[0], opt, fetcher)
        extractor = Extractor(fetcher, record, opt)
        progress = extractor.progress
        progress.start(0 if extractor.patterns.any
                       else record.bytes + ENTRY_SIZE * record.entries)
        try:
            if opt.to_stdout:
                extract_stdout(extractor, opt)
            else:
                extractor.run()
        finally:
            progress.close()
        progress.finish()
        extractor.errors += unmatched(extractor.patterns) + truncated(record)
        if opt.json:
            extractor.summary()
        return extractor.errors
    finally:
        fetcher.close()


def extract_stdout(extractor, opt):
    """-x -O: the content of files, one after the other."""
    extractor.careful = False
    stream = extractor.fetcher.ahead(extractor.plan())
    for slot, member in stream:
        if not isinstance(member, Member) or member.entry.kind != FILE:
            continue
        message = None
        chosen = not opt.interactive or ask(b'extract', member.path)
        extractor.progress.begin(member.path)
        try:
            for part, extent in extractor.content(slot, member, stream):
                if not chosen:
                    break
                content_write(1, part, extent)
        except CorruptError as e:
            message = str(e)
        extractor.progress.end(member.entry.size)
        if member.many:
            extractor.skip(member, stream)
        if message is not None:
            extractor.complain(member.path, message)
        elif chosen:
            extractor.extracted(member)


ZEROS = bytes(64 * KIB)


def content_write(fd, slot, extent):
    """Write one extent to `fd`, a hole as zeros."""
    offset, length, repeat = extent
    try:
        if slot:
            data = piece(slot, offset, length)
            for _ in range(repeat):
                write_all(fd, data)
            return
        left = length * repeat
        while left:
            write_all(fd, ZEROS[:left])
            left -= min(left, len(ZEROS))
    except OSError as e:
        raise stdout_error(e) from None


##############################################################################
# List: -t, -r and --list-archives
#
# What is parsed by other programs, to the byte.  Writes standard output only.
##############################################################################

# -t.


class Namer:
    """Which name of a hard-linked file came first among those listed."""

    def __init__(self):
        self.first = collections.OrderedDict()  # link id -> (path, ident)

    def name(self, entry, page, path):
        """The first name of `entry`, if `path` is not the first itself."""
        ident = content_ident(entry, page)
        known = self.first.get(entry.link)
        if known and known[1] == ident:
            return known[0]
        self.first[entry.link] = (path, ident)
        if len(self.first) > LINKS_KEPT:
            self.first.popitem(last=False)
        return None


class Lister:
    """The lines of -t."""

    def __init__(self, opt, output):
        self.opt = opt
        self.output = output
        self.patterns = Patterns(opt.exclude, opt.include, opt.operands,
                                 opt.fast_read)
        self.lines = LongLines(opt)
        self.errors = 0
        self.names = Namer()

    def run(self, fetcher, record):
        simple = not (self.opt.verbose or self.opt.newer or self.opt.json)
        for page in archive_pages(fetcher, record, self.patterns.literals(),
                                  self.bad):
            try:
                if not (self.paths(page) if simple else self.rows(page)):
                    break
            except CorruptError as e:
                self.bad(e)
            self.output.tick()
        if self.opt.verbose > 1 and not self.opt.json:
            self.output.put(b'Archive Format: tarsnap-archive-1')
        self.output.flush()

    def bad(self, error):
        self.errors += 1
        warn('%s; the entries it holds are missing here' % error)

    def done(self):
        """True if -q has met all its operands."""
        return self.opt.fast_read and self.patterns.includes \
            and not self.patterns.missed

    def paths(self, page):
        """List a page, paths only; False to stop."""
        put, escape, opt = self.output.put, self.lines.escape, self.opt
        edit = opt.rename or opt.strip_components
        chosen = self.patterns.selected if self.patterns.any else None
        for kind, path in page_paths(page):
            if chosen and not chosen(path):
                if self.done():
                    return False
                continue
            if edit:
                path = path_edit(path, opt)
                if path is None:
                    continue
            path = escape(path)
            put(path + b'/' if kind == DIRECTORY else path)
        return True

    def rows(self, page):
        """List a page entry by entry; False to stop."""
        for entry in page_rows(page):
            if self.opt.newer and not self.opt.newer(entry):
                continue
            if self.patterns.any and not self.patterns.selected(entry.path):
                if self.done():
                    return False
                continue
            path = path_edit(entry.path, self.opt)
            if path is None:
                continue
            target_edit(entry, self.opt)
            first = entry.link and self.names.name(entry, page, path)
            self.output.put(self.row(entry, path, first))
        return True

    def row(self, entry, path, first):
        """What is printed of an entry."""
        if self.opt.json:
            return json_line(json_entry(entry, path, first))
        if self.opt.verbose:
            return self.lines.line(entry, path, first)
        slash = b'/' if entry.kind == DIRECTORY else b''
        return self.lines.escape(path) + slash


def mode_list(remote, opt):
    """-t: the number of errors met."""
    live = history_live(remote, opt)
    fetcher = Fetcher(remote)
    try:
        record = archive_find(remote, live, opt.names[0], opt, fetcher)
        output = Output(2 if opt.to_stdout else 1,
                        b'\0' if opt.null_output else b'\n')
        lister = Lister(opt, output)
        lister.run(fetcher, record)
        return lister.errors + unmatched(lister.patterns) \
            + truncated(record)
    finally:
        fetcher.close()


# -r: a tar stream: ustar headers, and pax records for what does not fit them,
# those of GNU tar among them for holes and extended attributes.

TAR_HEAD = struct.Struct('100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x')
TAR_TYPES = {FILE: b'0', SYMLINK: b'2', CHARDEV: b'3', BLOCKDEV: b'4',
             DIRECTORY: b'5', FIFO: b'6'}
TAR_LINK, TAR_PAX = b'1', b'x'
TAR_RECORD = 10240
TAR_ACLS = {ACLS[0]: b'SCHILY.acl.access', ACLS[1]: b'SCHILY.acl.default'}
ACL_ENTRY = struct.Struct('<HHI')       # tag, permissions, id
ACL_TAGS = {1: b'user:', 2: b'user:%d', 4: b'group:', 8: b'group:%d',
            16: b'mask:', 32: b'other:'}
NOBODY = 0xffffffff         # in an ACL entry that is for no user or group
SPARSE_NAME = b'GNU.sparse.name'


class TarHead:
    """The header of one member, and the pax records before it."""

    def __init__(self, kind, name, size=0):
        self.kind = kind
        self.name = name
        self.size = size
        self.mode = self.uid = self.gid = 0
        self.mtime = 0              # nanoseconds
        self.link = b''
        self.uname = self.gname = b''
        self.device = (0, 0)
        self.pax = {}               # keyword -> value, bytes

    def pack(self):
        """Its bytes, padded."""
        block = self.block()
        if not self.pax:
            return block
        if SPARSE_NAME in self.pax:     # the last name counts
            self.pax[SPARSE_NAME] = self.pax.pop(SPARSE_NAME)
        text = b''.join(pax_record(key, value)
                        for key, value in self.charset() + list(
                            self.pax.items()))
        head = TarHead(TAR_PAX, b'././@PaxHeader', len(text))
        head.mode = 0o644
        return b''.join((head.block(), text, bytes(-len(text) % 512), block))

    def block(self):
        """The 512 bytes; what they cannot hold goes into `pax`."""
        seconds, nanos = divmod(self.mtime, BILLION)
        if nanos or self.mtime < 0:
            self.pax[b'mtime'] = tar_time(self.mtime)
        if max(self.device) >= 8 ** 7:
            raise EntryError('Device number too large for a tar file')
        fields = (
            self.text(b'path', self.name, 100), b'%07o' % self.mode,
            self.number(b'uid', self.uid, 7),
            self.number(b'gid', self.gid, 7),
            self.number(b'size', self.size, 11),
            self.number(b'mtime', max(seconds, 0), 11), b' ' * 8, self.kind,
            self.text(b'linkpath', self.link, 100), b'ustar\x0000',
            self.text(b'uname', self.uname, 31),
            self.text(b'gname', self.gname, 31),
            b'%07o' % self.device[0], b'%07o' % self.device[1], b'')
        block = TAR_HEAD.pack(*fields)
        return b'%b%06o\0 %b' % (block[:148], sum(block), block[156:])

    def text(self, keyword, value, room):
        if len(value) > room or not value.isascii():
            self.pax.setdefault(keyword, value)
        return value[:room]

    def number(self, keyword, value, digits):
        if value >= 8 ** digits:
            self.pax.setdefault(keyword, b'%d' % value)
            value = 0
        return b'%0*o' % (digits, value)

    def charset(self):
        """The record that says that names are not all UTF-8, if so."""
        for keyword in (b'path', b'linkpath', b'uname', b'gname',
                        SPARSE_NAME):
            try:
                self.pax.get(keyword, b'').decode()
            except UnicodeDecodeError:
                return [(b'hdrcharset', b'BINARY')]
        return []


def pax_record(keyword, value):
    """One record, which begins with its own length."""
    body = len(keyword) + len(value) + 3
    length = body + len(b'%d' % body)
    length = body + len(b'%d' % length)
    return b'%d %b=%b\n' % (length, keyword, value)


def tar_time(nanos):
    """Nanoseconds as pax's decimal seconds."""
    sign, nanos = (b'-', -nanos) if nanos < 0 else (b'', nanos)
    seconds, nanos = divmod(nanos, BILLION)
    text = b'%b%d.%09d' % (sign, seconds, nanos)
    return text.rstrip(b'0').rstrip(b'.')


def acl_text(value):
    """The text of an ACL as Linux stores it; b'' if it is none we know.

    Users and groups stand as numbers: names would be those of this machine.
    """
    words = []
    if value[:4] != b'\2\0\0\0' or len(value) % ACL_ENTRY.size != 4:
        return b''
    for tag, bits, number in ACL_ENTRY.iter_unpack(value[4:]):
        if tag not in ACL_TAGS or bits > 7:
            return b''
        name = ACL_TAGS[tag]
        words.append(b'%b:%b' % (
            name % number if b'%' in name else name,
            stat.filemode(bits << 6)[1:4].encode()))
    return b','.join(words)


def acl_value(text):
    """The ACL that `text`, with numbers or names, says, as Linux stores it;
    ValueError for one it does not know.
    """
    kinds, rows = {name: tag for tag, name in ACL_TAGS.items()}, []
    for word in re.split(b'[,\n]', text):
        kind, who, bits, number = (word.partition(b'#')[0].strip().split(b':')
                                   + [b''] * 3)[:4]
        if not kind:
            continue
        tag = kinds.get(kind + (b':%d' if who else b':'))
        if tag is None:
            raise ValueError('an ACL of unknown form')
        rows.append((tag, sum(4 >> at for at, letter in enumerate(b'rwx')
                              if letter in bits),
                     acl_number(kind, number or who) if who else NOBODY))
    return b'\2\0\0\0' + b''.join(ACL_ENTRY.pack(*row)
                                  for row in sorted(rows))


def acl_number(kind, who):
    """The number of a user or group; ValueError if there is none."""
    import grp
    import pwd
    try:
        if who.isdigit():
            return int(who) & NOBODY
        return pwd.getpwnam(os.fsdecode(who)).pw_uid if kind == b'user' \
            else grp.getgrnam(os.fsdecode(who)).gr_gid
    except KeyError:
        raise ValueError('an ACL for %s, whom nobody knows here'
                         % show(who)) from None


# GNU tar reads each region of a sparse file from a block of its own, so all
# begin and end at multiples of 512, with zeros of the holes around.


def sparse_up(at):
    return (at + 511) & ~511


def sparse_down(at):
    return at & ~511


def sparse_gap(out, at):
    """True if data at `at` begins a region, the last one ending at `out`."""
    return sparse_down(at) > sparse_up(out)


def sparse_map(regions, size):
    """The map, padded; it ends with an empty region where the file does."""
    regions = regions + [[size, 0]]
    text = b'%d\n' % len(regions) + b''.join(
        b'%d\n%d\n' % tuple(region) for region in regions)
    return text + bytes(-len(text) % 512)


class TarWriter:
    """Writes entries as members of a tar stream; flat memory."""

    def __init__(self, fetcher, fd):
        self.fetcher = fetcher
        self.fd = fd
        self.written = 0        # bytes, for the last padding
        self.waiting = []       # short pieces not written yet
        self.names = Namer()

    def write(self, data):
        """Short pieces are gathered: a file is a header and a few bytes."""
        self.written += len(data)
        self.waiting.append(data)
        if len(data) > 16 * KIB or len(self.waiting) >= 64:
            self.flush()

    def flush(self):
        data, self.waiting = b''.join(self.waiting), []
        try:
            write_all(self.fd, data)
        except OSError as e:
            raise stdout_error(e) from None

    def pad(self, size):
        self.write(bytes(-self.written % size))

    def member(self, entry, page, content):
        """One member.  `content` yields (slot, extent)."""
        head = self.head(entry, page)
        first = entry.link and self.names.name(entry, page, entry.path)
        if first:
            head.kind, head.link = TAR_LINK, first
            self.write(head.pack())
        elif entry.kind != FILE:
            self.write(head.pack())
        elif self.holes(entry):
            self.sparse(head, entry, page, content)
        else:
            head.size = entry.size
            self.write(head.pack())
            self.body(content, entry.size)

    def head(self, entry, page):
        """The TarHead of an entry, for any type."""
        slash = b'/' if entry.kind == DIRECTORY else b''
        head = TarHead(TAR_TYPES[entry.kind], entry.path + slash)
        head.mode, head.uid, head.gid = entry.mode, entry.uid, entry.gid
        head.uname, head.gname = entry.uname, entry.gname
        head.mtime, head.link = entry.mtime, entry.target
        head.device = entry.device
        if entry.atime is not None:
            head.pax[b'atime'] = tar_time(entry.atime)
        for name, value in entry.xattrs:
            if isinstance(value, int):
                value = self.fetcher.get(page.kids[value])
            text = name in TAR_ACLS and acl_text(value)
            if text:            # most readers take ACLs from here only
                head.pax[TAR_ACLS[name]] = text
            name = name.replace(b'%', b'%25').replace(b'=', b'%3D')
            head.pax[b'SCHILY.xattr.' + name] = value
        return head

    def holes(self, entry):
        """True if a hole may be among the extents."""
        return bool(entry.lists) or any(extent[0] == HOLE
                                        for extent in entry.extents)

    def body(self, content, size):
        """The data and its padding, always `size` bytes: what is damaged is
        zeros, and a CorruptError after it."""
        damage, left = None, size
        for slot, extent in content:
            left -= extent[1] * extent[2]
            if left < 0:
                raise CorruptError('Holds more than %d bytes' % size)
            damage = self.extent(slot, extent) or damage
        self.zeros(left)
        self.pad(512)
        if damage or left:
            raise damage or CorruptError('Holds %d bytes too few' % left)

    def extent(self, slot, extent):
        """Write one extent; the CorruptError if it is damaged."""
        offset, length, repeat = extent
        try:
            data = slot and piece(slot, offset, length)
        except CorruptError as e:
            self.zeros(length * repeat)
            return e
        for _ in range(repeat):
            self.write(data) if data else self.zeros(length)
        return None

    def zeros(self, length):
        while length > 0:
            self.write(ZEROS[:length])
            length -= len(ZEROS)

    def sparse(self, head, entry, page, content):
        """A file with holes: GNU.sparse 1.0, a map and then the data."""
        regions, out, at = [[0, 0]], 0, 0
        for kid, _, length, repeat in entry_extents(self.fetcher, entry,
                                                    page):
            if kid:
                if sparse_gap(out, at):
                    regions[-1][1] = sparse_up(out) - regions[-1][0]
                    regions.append([sparse_down(at), 0])
                out = at + length * repeat
            at += length * repeat
        regions[-1][1] = min(sparse_up(out), at) - regions[-1][0]
        if at != entry.size:
            raise CorruptError('Holds %d of %d bytes' % (at, entry.size))
        if regions[0] == [0, at]:
            head.size = at
            self.write(head.pack())
            self.body(content, at)
            return
        text = sparse_map([region for region in regions if region[1]], at)
        head.pax.update({
            b'GNU.sparse.major': b'1', b'GNU.sparse.minor': b'0',
            SPARSE_NAME: head.name,
            b'GNU.sparse.realsize': b'%d' % at})
        above, _, name = head.name.rpartition(b'/')
        head.name = (above or b'.') + b'/GNUSparseFile.0/' + name
        head.size = len(text) + sum(length for _, length in regions)
        self.write(head.pack())
        self.write(text)
        self.sparse_body(content, at)

    def sparse_body(self, content, size):
        """The data of the regions that sparse() found, in the same way."""
        out, at, damage = 0, 0, None
        for slot, extent in content:
            if slot:
                if sparse_gap(out, at):
                    self.zeros(sparse_up(out) - out)
                    out = sparse_down(at)
                self.zeros(at - out)
                damage = self.extent(slot, extent) or damage
                out = at + extent[1] * extent[2]
            at += extent[1] * extent[2]
        self.zeros(min(sparse_up(out), size) - out)
        self.pad(512)
        if damage:
            raise damage

    def end(self):
        """The end of the archive, padded to tar's record size."""
        self.write(bytes(1024))
        self.pad(TAR_RECORD)
        self.flush()


def mode_tar(remote, opt):
    """-r: the number of errors met."""
    fetcher = Fetcher(remote, openers_make(remote.key))
    try:
        live = history_live(remote, opt)
        record = archive_find(remote, live, opt.names[0], opt, fetcher)
        extractor = Extractor(fetcher, record, opt)     # for its plan
        writer = TarWriter(fetcher, 1)
        stream = fetcher.ahead(extractor.plan())
        for slot, member in stream:
            if isinstance(member, Member):
                tar_member(extractor, writer, slot, member, stream)
        writer.end()
        return extractor.errors + truncated(record)
    finally:
        fetcher.close()


def tar_member(extractor, writer, slot, member, stream):
    """Write one member; say what is wrong with it."""
    message = None
    try:
        writer.member(member.entry, member.page,
                      extractor.content(slot, member, stream))
    except (CorruptError, EntryError) as e:
        message = str(e)
    if member.many:
        extractor.skip(member, stream)
    if message is not None:
        extractor.complain(member.path, message)


# --list-archives.


def archive_records(remote, live, bad):
    """(archive id, Record) of all archives, many records in flight."""
    fetcher = Fetcher(remote)
    jobs = ((record_kid(live[archive][0]), False, archive)
            for archive in sorted(live))
    try:
        for slot, archive in fetcher.ahead(jobs):
            try:
                record = slot.get()
                record_check(record, archive, live[archive])
            except CorruptError as e:
                bad(e)
                continue
            yield archive, record
    finally:
        fetcher.close()


def mode_list_archives(remote, opt):
    """--list-archives: the number of errors met."""
    live = history_live(remote, opt)
    errors = []
    if opt.names:
        live = hashes_pick(live, opt.names, errors)
    rows = []
    for archive, record in archive_records(remote, live, errors.append):
        rows.append((record.created, record.title, archive, record))
    output = Output(1, b'\0' if opt.null_output else b'\n')
    for _, _, archive, record in sorted(rows, key=lambda row: row[:3]):
        output.put(list_line(archive, record, opt, output.tty))
    output.flush()
    for error in errors:
        warn(str(error))
    return len(errors)


def hashes_pick(live, texts, errors):
    """Those of `live` that `texts` name in hexadecimal."""
    chosen = {}
    for text in texts:
        try:
            archive = bytes.fromhex(text.decode('ascii'))
        except ValueError:
            archive = b''
        if len(archive) != 32:
            errors.append(UserError(
                '%s: Not the hash of a name: 64 hexadecimal digits, as '
                '--hashes prints them' % show(path_escape(text))))
        elif archive in live:
            chosen[archive] = live[archive]
        else:
            errors.append(Missing(text))
    return chosen


def list_line(archive, record, opt, tty):
    """One record of --list-archives, without its end.

    Names are exact, since they are read back, but on a terminal.
    """
    if opt.json:
        return json_line(json_archive(archive, record))
    fields = [archive.hex().encode()] if opt.hashes else []
    if opt.verbose or not fields:
        fields.append(path_escape(record.title)
                      if tty and not opt.null_output else record.title)
    if opt.verbose:
        fields.append(date_text(record.created))
    if opt.verbose > 1 and opt.null_output:
        fields.append(b'\0\0\0'.join(record.argv))
    elif opt.verbose > 1:           # a word may hold a newline
        fields.append(b' '.join(map(controls_escape, record.argv)))
    return (b'\0\0' if opt.null_output else b'\t').join(fields)


def json_archive(archive, record):
    """What JSON says of an archive, as json_line wants it."""
    fields = {
        'type': 'archive', 'name': record.title, 'id': archive.hex(),
        'created': json_time(record.created * BILLION),
        'complete': record.complete, 'entries': record.entries,
        'bytes': record.bytes}
    if record.argv:             # hidden from a key that only prunes
        fields['host'] = record.host
        fields['command'] = record.argv
    return fields


##############################################################################
# Merge: what -c takes from other archives
#
# An operand @@NAME stands for the entries of a stored archive.  A page from
# which nothing is left out is referred to as it is, and nothing of it is even
# read if nothing has to be said of its entries; of others the rows are made
# anew with the content they name.  No content is fetched or sent.
##############################################################################


def merged_path(entry, opt):
    """What an entry is called in the new archive; None to leave it out."""
    patterns = opt.patterns
    if patterns and (patterns.excluded(entry.path)
                     or not patterns.included(entry.path)):
        return None
    if opt.newer and not opt.newer(entry):
        return None
    return path_edit(entry.path, opt)


class Merge:
    """Puts what operands @@NAME stand for into a Writer; close() it."""

    def __init__(self, opt, remote, live):
        """`live()` gives the live archives, checked."""
        self.opt = opt
        self.live = live
        self.fetcher = Fetcher(remote)
        self.records = {}           # name -> Record of each operand

    def open(self):
        """Find the archives; UserError for one that does not exist."""
        live = self.live()
        for kind, name in self.opt.items:
            if kind != 'archive' or name in self.records:
                continue
            record = self.records[name] = archive_find(
                self.fetcher.remote, live, name, self.opt, self.fetcher)
            if not record.complete and not self.opt.quiet:
                warn('%s was cut short; the entries it has are taken'
                     % show(name))

    def close(self):
        self.fetcher.close()

    def archive(self, writer, name):
        """Take in the archive `name`; yields after each page of it."""
        record, opt = self.records[name], self.opt
        if record.archive not in self.live():       # after a Restart
            raise self.gone()
        look = bool(opt.patterns or opt.newer or opt.rename or opt.verbose
                    or opt.progress_bytes)
        kid = page = None
        for kid, note, page in self.pages(record.kids, record.level, look):
            if page is not None:
                self.page(writer, kid, page, note)
            else:
                writer.order(note[0])
                writer.progress.begin(note[0], 0, 'copying')
                writer.progress.add(*note[1:])
                self.refer(writer, kid, note)
            yield
        writer.page_end()
        if kid is not None and page is None:
            writer.sorted &= record.sorted
            for entry in page_rows(self.fetcher.get(kid)):
                writer.previous = entry.path.split(b'/')

    def pages(self, kids, level, look):
        """(Kid, (first member, entries, bytes), its IndexBlock) of each page
        below `kids`; None for a block that need not be read without `look`.
        """
        jobs = ((kid, False, None) for kid in kids)
        for slot, _ in self.fetcher.ahead(jobs, INDEX_WINDOW):
            block = index_get(slot, PAGE_LIST if level else PAGE, level)
            if not level:
                yield slot.kid, self.note(block), block
            elif level > 1 or look:
                yield from self.pages(block.kids, level - 1, look)
            else:
                for kid, note in zip(block.kids, list_notes(block)):
                    yield kid, note, None

    def note(self, page):
        """(first member, entries, bytes) of a page."""
        first, entries, size = None, 0, 0
        for entry in page_rows(page):
            first = first or entry.path
            entries += 1
            size += entry.size
        return first or b'', entries, size

    def page(self, writer, kid, page, note):
        """Take in a page that was read: whole, or what is selected."""
        for part in page.kids:
            writer.sink.meet(part, 0)
        rows = [(entry, merged_path(entry, self.opt))
                for entry in page_rows(page)]
        whole = all(path == entry.path for entry, path in rows) \
            and not (self.opt.rename and self.opt.rename.links)
        for entry, path in rows:
            if path is None:
                continue
            if self.opt.verbose:
                writer.say(path, entry, False)
            writer.progress.begin(path, entry.size, 'copying')
            if whole:
                writer.order(path)
            else:
                entry.path = path
                target_edit(entry, self.opt)
                found = writer.referred(entry, page.kids,
                                        writer.sink.plain)
                if found is None:
                    raise self.gone()
                writer.enter(*found)
            writer.progress.end()
        if whole:
            writer.page_end()
            self.refer(writer, kid, note)

    def refer(self, writer, kid, note):
        """Enter a page as it is."""
        writer.sink.meet(kid, note[2])
        plain = writer.sink.plain(kid.name)
        if plain is None:
            raise self.gone()
        writer.page_refer(kid, note)

    def gone(self):
        return UserError('An archive to be merged was deleted meanwhile')


# Tar files.

TAR_HEADER_MOST = 4 * MIB   # bytes of one pax header or long name
TAR_LINKS = 50000           # files of a pipe a hard link can still name
# What the standard library makes of damaged or hostile input.
TAR_DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError,
              ArithmeticError, RecursionError, struct.error, zlib.error)


def tar_open(file, mode):
    """A TarFile that keeps, as `ended`, why there was no further header:
    for the standard library a damaged one is as good as the end.
    """
    import tarfile

    class Header(tarfile.TarInfo):
        @classmethod
        def fromtarfile(cls, tar):
            try:
                return super().fromtarfile(tar)
            except tarfile.HeaderError as e:
                tar.ended = e
                raise

        @classmethod
        def frombuf(cls, *args):
            found = super().frombuf(*args)
            if found.type in b'xgXLK' and found.size > TAR_HEADER_MOST:
                raise tarfile.InvalidHeaderError('header too long')
            return found

    return tarfile.open(fileobj=file, mode=mode, tarinfo=Header,
                        encoding='utf-8', errors='surrogateescape')


def tar_unpacked(file):
    """What a buffered file, compressed or not, holds.  In the standard
    library only these readers look at the checksums, at the end.
    """
    magic = file.peek(6)[:6]
    if magic.startswith(b'\x1f\x8b'):
        import gzip
        file = gzip.GzipFile(fileobj=file)
    elif magic.startswith(b'BZh'):
        import bz2
        file = bz2.BZ2File(file)
    elif magic.startswith(b'\xfd7zXZ\0'):
        import lzma
        file = lzma.LZMAFile(file)
    return CpioFile(file) if file.peek(6)[:6] in CPIO else file


class CpioFile:
    """A cpio file, read as the tar file it could be.

    The formats odc (POSIX.1-2001 pax(1), octal numbers) and newc (cpio(5),
    hexadecimal ones, with or without checksums).  Of a file with several
    names newc has the content with the last one only; the others become hard
    links to that.
    """

    def __init__(self, file):
        self.file = file
        self.out = b''                  # of the tar file, not yet read
        self.parts = self.entries()
        self.held = {}                  # inode -> TarInfos waiting for data
        self.named = collections.OrderedDict()  # inode -> TarInfo with data

    def read(self, size=-1):
        """As a raw file gives them: at most `size` bytes, b'' at the end."""
        while not self.out:
            part = next(self.parts, None)
            if part is None:
                return b''
            self.out = part
        if size < 0:
            size = len(self.out)
        data, self.out = self.out[:size], self.out[size:]
        return data

    def exactly(self, size):
        """`size` bytes of the cpio file, not many."""
        data = self.file.read(size) if size <= READ else b''
        if len(data) != size:
            raise ValueError('cut short')
        return data

    def entries(self):
        """The tar file in parts."""
        while True:
            magic = self.exactly(6)
            if magic not in CPIO:
                raise ValueError('damaged header')
            numbers, align = CPIO[magic](self)
            mode, uid, gid, links, mtime, size, inode, device, name = numbers
            path = self.exactly(name).rstrip(b'\0')
            self.skip(-(6 + 8 * 13 + name) % align)
            if path == b'TRAILER!!!':
                while self.file.read(READ):
                    pass
                break
            info = self.info(path, mode, uid, gid, mtime, device)
            if info.issym():
                info.linkname = os.fsdecode(self.exactly(size))
                yield from self.tar(info, 0)
            elif info.isreg() and links > 1:
                yield from self.linked(info, inode, size, align > 1)
            else:
                yield from self.tar(info, size if info.isreg() else 0)
            self.skip(-size % align)
        for infos in self.held.values():        # empty, all of them
            yield from self.tar(infos[0], 0)
            yield from self.links(infos[1:], infos[0])
        yield bytes(1024)

    def skip(self, size):
        while size:
            size -= len(self.exactly(min(size, READ)))

    def odc(self):
        """Numbers of an odc header; no padding."""
        text = self.exactly(70)
        at, out = 0, []
        for width in (6, 6, 6, 6, 6, 6, 6, 11, 6, 11):
            out.append(int(text[at:at + width], 8))
            at += width
        dev, ino, mode, uid, gid, links, rdev, mtime, name, size = out
        return (mode, uid, gid, links, mtime, size, (dev, ino),
                (rdev >> 8, rdev & 255), name), 1

    def newc(self):
        """Numbers of a newc header; names and contents are padded to 4."""
        text = self.exactly(104)
        (ino, mode, uid, gid, links, mtime, size, major, minor, rmajor,
         rminor, name, _) = (int(text[at:at + 8], 16)
                             for at in range(0, 104, 8))
        return (mode, uid, gid, links, mtime, size, (major, minor, ino),
                (rmajor, rminor), name), 4

    def info(self, path, mode, uid, gid, mtime, device):
        """The TarInfo of an entry, without content."""
        import tarfile
        kinds = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE,
                 stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFIFO: tarfile.FIFOTYPE,
                 stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFBLK: tarfile.BLKTYPE}
        if stat.S_IFMT(mode) not in kinds:
            raise ValueError('an entry of unknown mode %o' % mode)
        info = tarfile.TarInfo(os.fsdecode(path))
        info.type = kinds[stat.S_IFMT(mode)]
        info.mode, info.uid, info.gid = stat.S_IMODE(mode), uid, gid
        info.mtime, (info.devmajor, info.devminor) = mtime, device
        return info

    def tar(self, info, size):
        """A member of the tar file, its `size` bytes read from here."""
        import tarfile
        info.size = size
        yield info.tobuf(tarfile.PAX_FORMAT, 'utf-8', 'surrogateescape')
        left = size
        while left:
            data = self.exactly(min(left, READ))
            left -= len(data)
            yield data
        if size % 512:
            yield bytes(-size % 512)

    def linked(self, info, inode, size, last):
        """A file with several names; `last`: only one has the content, the
        last; else each has it.
        """
        if inode in self.named:
            self.skip(size)
            yield from self.links([info], self.named[inode])
            return
        held = self.held.pop(inode, [])
        if last and not size:
            self.held[inode] = held + [info]
            if sum(map(len, self.held.values())) > TAR_LINKS:
                raise ValueError('too many names of files wait for content')
            return
        yield from self.tar(info, size)
        yield from self.links(held, info)
        self.named[inode] = info
        if len(self.named) > TAR_LINKS:
            self.named.popitem(last=False)

    def links(self, infos, to):
        import tarfile
        for info in infos:
            info.type, info.linkname = tarfile.LNKTYPE, to.name
            yield from self.tar(info, 0)


CPIO = {b'070707': CpioFile.odc, b'070701': CpioFile.newc,
        b'070702': CpioFile.newc}


def tar_bytes(text):
    return text.encode('utf-8', 'surrogateescape')


def tar_nanos(text):
    """Nanoseconds of a time in a pax header."""
    found = re.fullmatch(r'(-?)([0-9]{1,19})(?:\.([0-9]*))?', text)
    if not found:
        raise ValueError('not a time: %s' % text)
    sign, seconds, fraction = found.groups('')
    nanos = int(seconds) * BILLION + int((fraction + '0' * 9)[:9])
    return -nanos if sign else nanos


class TarInput:
    """Puts the entries of a tar file into a Writer; run() once."""

    def __init__(self, opt, writer, fd, what, member):
        """`what` names the file in messages; member(path) is what a path is
        called in an archive.
        """
        self.opt = opt
        self.writer = writer
        self.fd = fd
        self.what = what
        self.member = member
        self.file = self.tar = self.targets = None
        # Path -> (Entry, Content, attributes as the file says them).
        self.seen = collections.OrderedDict()
        self.count = 0                          # link ids given

    def run(self):
        """Take everything in, and yield after each entry; damage is an error
        like that of a file, and the entries before it are kept.
        """
        import lzma
        import tarfile
        damage = TAR_DAMAGE + (tarfile.TarError, lzma.LZMAError)
        try:
            self.look_ahead(damage)
            with open(self.fd, 'rb', closefd=False) as file:
                while True:
                    info = self.checked(damage, self.next, file)
                    if info is None:
                        break
                    self.entry(damage, info)
                    yield
        except CorruptError as e:
            self.writer.reader.open = self.writer.progress.path = None
            self.writer.report(
                '%s: %s; what comes before is taken' % (self.what, e)
                if self.tar else '%s: not a tar file: %s' % (self.what, e))
        self.writer.page_end()

    def checked(self, damage, function, *args):
        """What a function that reads gives; CorruptError for what it cannot
        read.
        """
        try:
            return function(*args)
        except damage as e:
            raise CorruptError(getattr(e, 'strerror', None) or e) from None

    def look_ahead(self, damage):
        """Learn, where the file can be read twice, which of its members are
        named by hard links.
        """
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            return
        start, targets = os.lseek(self.fd, 0, os.SEEK_CUR), set()
        try:
            with open(self.fd, 'rb', closefd=False) as file:
                cpio = isinstance(tar_unpacked(file), CpioFile)
            os.lseek(self.fd, start, os.SEEK_SET)
            if cpio:
                return
            with open(self.fd, 'rb', closefd=False) as file, \
                    tar_open(file, 'r:*') as tar:
                while True:
                    info = tar.next()
                    tar.members.clear()
                    if info is None:
                        break
                    if info.islnk():
                        targets.add(info.linkname)
            self.targets = targets
        except damage:
            self.targets = targets      # the other reading says what it is
        os.lseek(self.fd, start, os.SEEK_SET)

    def next(self, file):
        """The next TarInfo, None at the end."""
        import tarfile
        if self.tar is None:
            self.file = tar_unpacked(file)
            self.tar = tar_open(self.file, 'r|')
        info = self.tar.next()
        self.tar.members.clear()        # it would keep them all
        if info is None and not isinstance(self.tar.ended,
                                           tarfile.EOFHeaderError):
            raise ValueError(
                'ends without an end mark, and may have been cut short'
                if isinstance(self.tar.ended, tarfile.EmptyHeaderError)
                else 'damaged header (%s)' % self.tar.ended)
        while info is None and self.file.read(READ):
            pass            # who writes the pipe writes it all
        return info

    def entry(self, damage, info):
        """Take in one member."""
        try:
            entry = self.convert(info)
            path = entry and merged_path(entry, self.opt)
            if path:
                entry.xattrs = self.attributes(info)
        except (ValueError, OverflowError) as e:
            self.writer.report('%s: %s: %s' % (self.what, info.name, e))
            return
        if not path:
            return
        entry.path = path
        target_edit(entry, self.opt)
        writer, content = self.writer, None
        entry.size = info.size if info.isreg() else 0
        if self.opt.verbose:
            writer.say(path, entry, False)
        writer.progress.begin(path, entry.size, 'copying')
        if info.islnk():
            content = self.linked(entry, info)
        elif entry.kind == FILE:
            content = self.content(damage, info)
        if content:
            entry.size = content.size
        elif entry.kind == FILE:
            return
        said = entry.xattrs
        try:
            entry.xattrs, xattrs = writer.attributes_keep(said)
        except OSError as e:
            writer.report('%s: %s: %s' % (self.what, show(path), e.strerror))
            return
        self.remember(info, entry, content, said)
        writer.enter(entry, content, xattrs)
        writer.progress.end(entry.size)

    def convert(self, info):
        """The Entry of a TarInfo, without content; None for what is no entry;
        ValueError for what cannot be stored.
        """
        import tarfile
        entry, pax = Entry(), info.pax_headers
        kinds = {tarfile.DIRTYPE: DIRECTORY, tarfile.SYMTYPE: SYMLINK,
                 tarfile.FIFOTYPE: FIFO, tarfile.CHRTYPE: CHARDEV,
                 tarfile.BLKTYPE: BLOCKDEV, tarfile.LNKTYPE: FILE}
        if info.type == b'V':           # the name of a volume
            return None
        if info.type not in kinds and not info.isreg():
            raise ValueError('an entry of unknown type %r' % info.type)
        entry.kind = kinds.get(info.type, FILE)
        entry.path = self.member(tar_bytes(info.name) or b'.')
        entry.mode = info.mode & 0o7777
        entry.uid, entry.gid = info.uid, info.gid
        entry.uname = tar_bytes(info.uname)[:255]
        entry.gname = tar_bytes(info.gname)[:255]
        entry.mtime = tar_nanos(pax['mtime']) if 'mtime' in pax \
            else int(info.mtime) * BILLION
        if self.opt.store_atime and 'atime' in pax:
            entry.atime = tar_nanos(pax['atime'])
        if entry.kind == SYMLINK:
            entry.target = tar_bytes(info.linkname)
        if entry.kind in (CHARDEV, BLOCKDEV):
            entry.device = (info.devmajor, info.devminor)
        if b'\0' in entry.path + entry.target or \
                max(len(entry.path), len(entry.target)) > LONGEST_PATH:
            raise ValueError('a path that cannot be one')
        if not all(0 <= number < 1 << 32 for number in (
                entry.uid, entry.gid, *entry.device)) or info.size < 0 \
                or abs(entry.mtime) >= BILLION << 63 \
                or abs(entry.atime or 0) >= BILLION << 63:
            raise ValueError('a number that is out of range')
        return entry

    def content(self, damage, info):
        """The Content of a file, read from the tar file as it comes."""
        # Its buffer would ask for more than a pipe can do.
        file = self.checked(damage, self.tar.extractfile, info).raw

        def read(size, pos):
            def once():
                file.seek(pos)
                return file.read(size)

            data = self.checked(damage, once)
            if len(data) != size:
                raise CorruptError('%s: cut short' % info.name)
            return data

        return self.writer.reader.read_input(
            read, info.size, [(0, info.size)] if info.sparse is None
            else info.sparse, info.uid)

    def attributes(self, info):
        """(name, value) of the extended attributes in pax headers."""
        found = {}
        for key, value in info.pax_headers.items():
            if key.startswith('LIBARCHIVE.xattr.'):
                from urllib.parse import unquote_to_bytes
                value += '=' * (-len(value) % 4)
                found.setdefault(unquote_to_bytes(key[17:]),
                                 base64.b64decode(value))
            elif key.startswith('SCHILY.xattr.'):
                name = tar_bytes(key[13:]).replace(b'%3D', b'=')
                found[name.replace(b'%25', b'%')] = tar_bytes(value)
            elif key in ('SCHILY.acl.access', 'SCHILY.acl.default'):
                found.setdefault(ACLS[key.endswith('default')],
                                 acl_value(tar_bytes(value)))
        return sorted((name, value) for name, value in found.items()
                      if name and (value or name not in ACLS))

    # Hard links.

    def remember(self, info, entry, content, xattrs):
        """Keep what a hard link may name later."""
        if entry.kind == DIRECTORY or info.islnk() or \
                self.targets is not None and info.name not in self.targets:
            return
        self.seen[info.name] = entry, content, xattrs
        if self.targets is not None:
            self.link(entry)
        elif len(self.seen) > TAR_LINKS:
            self.seen.popitem(last=False)

    def link(self, entry):
        """A link id of its own for a file with several names."""
        self.count += 1
        entry.link = (self.count, self.writer.system(self))

    def linked(self, entry, info):
        """The Content of the file that a hard link names, and its kind.

        Of a pipe nobody knows in time which files are named: one whose page
        is stored by now stays a file of its own, with equal content.
        """
        first, content, xattrs = self.seen.get(info.linkname, (None,) * 3)
        if first is None:
            self.writer.report('%s: %s: hard link to %s, which is not here'
                               % (self.what, info.name, info.linkname))
            return None
        if not first.link:
            self.link(first)
        entry.link, entry.kind = first.link, first.kind
        entry.target, entry.device = first.target, first.device
        entry.xattrs = entry.xattrs or xattrs       # GNU tar says them once
        if content:             # a checkpoint may have come in between
            for block in [extent[0] for extent in content.extents] + (
                    content.tree[1] if content.tree else []):
                if block:
                    self.writer.sink.borrow(block.name)
        return content


##############################################################################
# Retention: which archives rules keep
#
# Rules are about times, within one series, in this process's time zone.  What
# one rule keeps is kept.  Whatever is in doubt is kept as well, and takes part
# in no rule.  Knows archives by their times and states; deletes nothing.
##############################################################################

DRIFT = 26 * 3600           # seconds two clocks may be apart: a zone and more

SPAN_UNIT = {'h': 3600, 'd': 86400, 'w': 7 * 86400, 'm': 31 * 86400,
             'y': 366 * 86400}      # rather too long than too short

# Rule -> what two times in one of its periods have in common.
PERIODS = {
    'hourly': lambda when: (when[:4], when.tm_gmtoff),
    'daily': lambda when: when[:3],
    'weekly': lambda when: time.strftime('%G-%V', when),
    'monthly': lambda when: when[:2],
    'yearly': lambda when: when[:1],
}


def span_parse(text):
    """(text, seconds) of `30d`, `1y6m`; UserError otherwise."""
    if not re.fullmatch(r'([0-9]{1,6}[hdwmy])+', text):
        raise UserError('Not a span of time: %s (as in 36h, 30d, 1y6m)'
                        % text)
    return text, sum(int(number) * SPAN_UNIT[unit]
                     for number, unit in re.findall(r'(\d+)(.)', text))


class Dated:
    """An archive, as far as retention knows it, and what becomes of it."""

    __slots__ = ('title', 'archive', 'record', 'series', 'created',
                 'received', 'time', 'doubt', 'reasons')

    def __init__(self, title, archive, record, series, created, received):
        self.title = title
        self.archive = archive      # its id
        self.record = record        # name of its record
        self.series = series        # series tag
        self.created = created      # seconds, as its maker claims
        self.received = received    # seconds, the server's clock
        self.time = received        # what rules go by
        self.doubt = ''             # why no rule may delete it
        self.reasons = []           # why rules keep it

    @property
    def kept(self):
        return bool(self.doubt or self.reasons)

    def why(self):
        """One line's worth on what becomes of it."""
        if self.kept:
            return 'kept: ' + (self.doubt or ', '.join(self.reasons))
        return 'deleted: no rule keeps it'


def dated_make(archive, record, link, opt, now):
    """The Dated of a Record that the history links by `link`."""
    dated = Dated(record.title, archive, record.name, record.series,
                  record.created, link[3])
    if opt.by_creation:
        dated.time = dated.created
    if link[2] == OPEN:
        dated.doubt = 'not finished, it may be being written'
    elif link[2] != COMPLETE or not record.complete:
        dated.doubt = 'incomplete, only -d deletes it'
    elif dated.time > now + DRIFT:
        dated.doubt = 'its date is in the future'
    elif not opt.by_creation and abs(dated.received - dated.created) > DRIFT:
        dated.doubt = 'created %s but received %s' % (
            date_text(dated.created).decode(),
            date_text(dated.received).decode())
    return dated


def retention(archives, rules, within=None):
    """Judge `archives`, Dated, each within its series: fills in reasons.

    `rules`: rule -> how many to keep; `within`: (text, seconds) or None.  Of
    equal times the one created later is newer, then that with the greater
    name.  The newest of a series is always kept.
    """
    groups = {}
    for dated in archives:
        if not dated.doubt:
            groups.setdefault(dated.series, []).append(dated)
    for group in groups.values():
        group.sort(key=lambda d: (d.time, d.created, d.title), reverse=True)
        for rule, count in rules.items():
            retention_rule(group, rule, count)
        if within:
            for dated in group:
                if dated.time >= group[0].time - within[1]:
                    dated.reasons.append('within %s' % within[0])
        if not group[0].reasons:
            group[0].reasons.append('newest of its series')


def retention_rule(group, rule, count):
    """Keep the newest of each of the last `count` periods that have one."""
    period, found, last = PERIODS.get(rule), 0, None
    for dated in group:
        this = period(time.localtime(dated.time)) if period else found
        if found == count:
            return
        if found and period and this == last:
            continue
        found, last = found + 1, this
        dated.reasons.append('%s %d of %d' % (rule, found, count))


def retention_lines(archives):
    """The same in the order of a listing: by series, the newest first."""
    newest = {}
    for dated in archives:
        best = newest.get(dated.series)
        if best is None or dated.time > best.time:
            newest[dated.series] = dated
    return sorted(archives, key=lambda d: (
        series_of(newest[d.series].title), d.series, -d.time, -d.created,
        d.title))


##############################################################################
# Diff: two archives, or an archive and the disk
#
# Where two archives name the same block, they are the same below it: only
# what differs is fetched.  What the disk holds is named as the archive names
# it, so that nothing needs to be fetched where names tell.  Prints; changes
# nothing.
##############################################################################

COMPARE = 256 * KIB         # bytes of a hole looked at at once


class Found:
    """An entry of one side of a comparison."""

    __slots__ = ('key', 'entry', 'page', 'place')

    def __init__(self, path, entry, page=None, place=None):
        self.key = path.split(b'/')     # what the sides are sorted by
        self.entry = entry
        self.page = page        # of the archive it is from
        self.place = place      # or (Folder, name, lstat) on the disk


def merge(left, right):
    """Pairs of two sorted streams of Found; None where one has no partner."""
    one, other = next(left, None), next(right, None)
    while one or other:
        if other is None or one and one.key < other.key:
            yield one, None
            one = next(left, None)
        elif one is None or other.key < one.key:
            yield None, other
            other = next(right, None)
        else:
            yield one, other
            one, other = next(left, None), next(right, None)


def sort_all(items):
    """A sorted stream of what has no order; of one path, the last."""
    latest = {tuple(item.key): item for item in items}
    return iter([latest[key] for key in sorted(latest)])


class Diff:
    """Compares, prints, counts."""

    def __init__(self, fetcher, opt):
        self.fetcher = fetcher
        self.opt = opt
        self.output = Output(1, b'\0' if opt.null_output else b'\n')
        self.escape = LongLines(opt).escape
        self.patterns = Patterns(opt.exclude, opt.include, opt.operands)
        self.names = fetcher.names
        self.owners = Owners(opt.numeric_owner)
        self.users = {}         # (uid, gid) -> names, on the disk
        self.counts = {b'+': 0, b'-': 0, b'M': 0}
        self.errors = 0

    def run(self, pairs):
        """Print what differs in `pairs`, of Found or None."""
        for old, new in pairs:
            if old is None:
                self.tell(b'+', old, new)
            elif new is None:
                self.tell(b'-', old, new)
            else:
                self.pair(old, new)
            self.output.tick()
        if self.opt.json:
            self.output.put(json_line({
                'type': 'summary', 'added': self.counts[b'+'],
                'removed': self.counts[b'-'],
                'modified': self.counts[b'M'], 'errors': self.errors}))
        self.output.flush()

    def pair(self, old, new):
        """Print in what two entries of one path differ, if they do."""
        try:
            words = self.differences(old, new)
        except (OSError, CorruptError) as e:
            self.complain(old.entry.path,
                          getattr(e, 'strerror', None) or str(e))
            return
        if words:
            self.tell(b'M', old, new, words)

    def tell(self, change, old, new, words=()):
        """One difference."""
        self.counts[change] += 1
        entry = (new or old).entry
        if self.opt.json:
            fields = {'type': 'difference', 'path': entry.path, 'change': {
                b'+': 'added', b'-': 'removed', b'M': 'modified'}[change]}
            if words:
                fields['what'] = list(words)
            for key, side in (('old', old), ('new', new)):
                if side:
                    fields[key] = json_entry(side.entry, side.entry.path)
            self.output.put(json_line(fields))
            return
        path = self.escape(entry.path) + (
            b'/' if entry.kind == DIRECTORY else b'')
        line = [change, path] if not words else [
            change, ','.join(words).encode(), path]
        self.output.put((b'\0\0' if self.opt.null_output else b' ')
                        .join(line))

    def complain(self, path, message):
        """Something cannot be compared."""
        self.errors += 1
        if self.opt.json:
            say_json({'type': 'error', 'path': path,
                      'message': os.fsencode(message)})
        else:
            say(b'%b: %b' % (path_escape(path), os.fsencode(message)))

    def bad(self, error):
        """Something of an archive itself cannot be read."""
        self.errors += 1
        warn('%s; the entries it holds are not compared' % error)

    # What differs.

    def differences(self, old, new):
        """Words for what is not equal in two entries of one path."""
        one, other = old.entry, new.entry
        if one.kind != other.kind:
            return ['type']
        checks = (
            ('content', one.kind != FILE or one.size == other.size
             and self.same_content(old, new)),
            ('target', one.target == other.target),
            ('device', one.device == other.device),
            ('mode', one.kind == SYMLINK or one.mode == other.mode),
            ('owner', self.same_owner(old, new)),
            ('mtime', one.mtime == other.mtime),
            ('xattrs', self.xattrs(old) == self.xattrs(new)))
        return [word for word, same in checks if not same]

    def same_owner(self, old, new):
        """By name, where there is one and numbers are not asked for."""
        one, other = old.entry, new.entry
        if new.place:
            return (self.owners.uid(one), self.owners.gid(one)) == (
                other.uid, other.gid)
        if self.opt.numeric_owner:
            return (one.uid, one.gid) == (other.uid, other.gid)
        return (one.uname or one.uid, one.gname or one.gid) == (
            other.uname or other.uid, other.gname or other.gid)

    def xattrs(self, side):
        """Name of attribute -> name its value has as a block."""
        if side.place:
            return {name: self.names.chunk(value)
                    for name, value in disk_xattrs(*side.place)}
        return {name: side.page.kids[value].name if isinstance(value, int)
                else self.names.chunk(value)
                for name, value in side.entry.xattrs}

    def same_content(self, old, new):
        """True if two files of one size hold the same bytes."""
        if new.place:
            return self.same_on_disk(old, *new.place)
        one, other = old.entry, new.entry
        if one.digest and other.digest:
            return one.digest == other.digest
        if one.lists and one.level == other.level and \
                [old.page.kids[number].name for number in one.lists] == \
                [new.page.kids[number].name for number in other.lists]:
            return True
        return self.same_extents(
            entry_extents(self.fetcher, one, old.page),
            entry_extents(self.fetcher, other, new.page))

    def same_extents(self, left, right):
        """Equal references are equal bytes; from the first that are not,
        content is fetched, up to the first byte that differs."""
        for one, other in itertools.zip_longest(left, right):
            if one is None or other is None or extent_mark(one) != \
                    extent_mark(other):
                return self.same_bytes(
                    self.extents_bytes(itertools.chain(
                        [one] if one else [], left)),
                    self.extents_bytes(itertools.chain(
                        [other] if other else [], right)))
        return True

    def extents_bytes(self, extents):
        """The content of extents, in pieces."""
        for kid, offset, length, repeat in extents:
            for _ in range(repeat):
                if kid:
                    yield bytes(piece(self.fetcher.want(kid), offset, length))
                    continue
                for at in range(0, length, COMPARE):
                    yield bytes(min(COMPARE, length - at))

    def same_bytes(self, left, right):
        """True if two streams of pieces are equal."""
        one = other = b''
        while True:
            one, other = one or next(left, b''), other or next(right, b'')
            size = min(len(one), len(other))
            if not size:
                return not one and not other
            if one[:size] != other[:size]:
                return False
            one, other = one[size:], other[size:]

    def same_on_disk(self, old, folder, name, status):
        """True if a file on the disk holds what the archive's does."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                     | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=folder.get())
        try:
            if not os.path.samestat(os.fstat(fd), status):
                raise OSError(errno.ESTALE, 'Replaced while it was compared')
            entry = old.entry
            if entry.digest:
                data = read_exactly(fd, entry.size + 1)
                return self.names.content(data) == entry.digest
            return all(self.same_extent(fd, *extent) for extent in
                       entry_extents(self.fetcher, entry, old.page)) \
                and not os.read(fd, 1)
        finally:
            os.close(fd)

    def same_extent(self, fd, kid, offset, length, repeat):
        """True if what comes next from `fd` is this extent."""
        if kid is None:
            for at in range(0, length, COMPARE):
                size = min(COMPARE, length - at)
                if read_exactly(fd, size) != bytes(size):
                    return False
            return True
        data = read_exactly(fd, length)
        if offset == 0 and length == kid.plain:
            same = self.names.chunk(data) == kid.name
        else:
            same = data == piece(self.fetcher.want(kid), offset, length)
        return same and all(read_exactly(fd, length) == data
                            for _ in range(repeat - 1))

    # The sides.

    def archive_items(self, pages):
        """Found for every entry of `pages` that is picked."""
        for page in pages:
            try:
                for entry in page_rows(page):
                    if self.patterns.selected(entry.path):
                        yield Found(entry.path, entry, page)
            except CorruptError as e:
                self.bad(e)

    def archives(self, first, second):
        """Pairs of what two archives do not share."""
        kids = pages_apart(self.fetcher, first, second, self.bad)
        sides = [self.archive_items(leaves(self.fetcher, side, 0, None,
                                           self.bad)) for side in kids]
        heads = [next(side, None) for side in sides]
        sides = [itertools.chain([head] if head else [], side)
                 for head, side in zip(heads, sides)]
        dotted = [head.key[0] == b'.' for head in heads if head]
        if first.sorted and second.sorted and len(set(dotted)) < 2:
            return merge(*sides)
        return merge(*[sort_all(trimmed(side)) for side in sides])

    def disk(self, record):
        """Pairs of an archive and of what is below the same names on disk."""
        items = self.archive_items(archive_pages(
            self.fetcher, record, self.patterns.literals(), self.bad))
        items = self.local(items)
        if not record.sorted:
            items = sort_all(items)
        root = [b'/']

        def top(item):
            """The entry highest above this one; they come in a row."""
            path = b'/'.join(item.key)
            if not self.opt.recurse or not path.startswith(
                    root[0].rstrip(b'/') + b'/'):
                root[0] = path
            return root[0]

        base = target_open(self.opt)
        try:
            for path, run in itertools.groupby(items, top):
                yield from merge(run, self.walk(base, path))
        finally:
            os.close(base)

    def local(self, items):
        """`items` under the paths to which they would be extracted."""
        for item in items:
            if item.key[0] == b'' and not self.opt.absolute:
                path = item.entry.path.lstrip(b'/') or b'.'
                item.key = path.split(b'/')
            yield item

    def walk(self, base, path):
        """Found for `path` on the disk and all below."""
        try:
            os.stat(path, dir_fd=base, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            pass                # the walk says so
        walk = Walk([('cd', name) for name in self.opt.directories]
                    + [('path', path)], self.opt, self.report,
                    directories_skipped(self.opt))
        try:
            for folder, name, member, status in walk:
                try:
                    entry = self.disk_entry(member, folder, name, status)
                except OSError as e:
                    self.complain(member, e.strerror)
                    continue
                yield Found(member, entry, None, (folder, name, status))
        finally:
            walk.close()

    def disk_entry(self, member, folder, name, status):
        """The Entry of what is on the disk, without content; or OSError."""
        entry = Entry()
        entry.path = member
        entry.kind = KIND_OF_MODE[stat.S_IFMT(status.st_mode)]
        entry.mode = stat.S_IMODE(status.st_mode)
        entry.uid, entry.gid = status.st_uid, status.st_gid
        owner = entry.uid, entry.gid
        if owner not in self.users:
            self.users[owner] = owner_names(*owner)
        entry.uname, entry.gname = self.users[owner]
        entry.mtime = status.st_mtime_ns
        if entry.kind == FILE:
            entry.size = status.st_size
        elif entry.kind == SYMLINK:
            entry.target = os.readlink(name, dir_fd=folder.get())
        elif entry.kind in (CHARDEV, BLOCKDEV):
            entry.device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        return entry

    def report(self, text):
        """What the walk cannot read."""
        self.errors += 1
        warn(text)


def trimmed(items):
    """`items` with keys that a './' in front of paths does not change."""
    for item in items:
        item.key = path_trim(item.entry.path).split(b'/')
        yield item


def extent_mark(extent):
    """What is equal for extents of equal bytes."""
    kid, offset, length, repeat = extent
    return kid and kid.name, offset, length, repeat


def pages_apart(fetcher, first, second, bad):
    """The Kids of pages of two archives, without those that both have."""
    sides = [(record.kids, record.level) for record in (first, second)]
    while True:
        (one, above), (other, beside) = sides
        if above == beside:
            shared = {kid.name for kid in one} & {kid.name for kid in other}
            sides = [([kid for kid in kids if kid.name not in shared], level)
                     for kids, level in sides]
        if not above and not beside:
            return sides[0][0], sides[1][0]
        highest = max(above, beside)
        sides = [(lists_open(fetcher, kids, level, bad), level - 1)
                 if level == highest else (kids, level)
                 for kids, level in sides]


def lists_open(fetcher, lists, level, bad):
    """The Kids in lists of pages."""
    kids = []
    for slot, _ in fetcher.ahead(((kid, False, None) for kid in lists),
                                 INDEX_WINDOW):
        try:
            kids += index_get(slot, PAGE_LIST, level).kids
        except CorruptError as e:
            bad(e)
    return kids


def disk_xattrs(folder, name, status):
    """(name, value) of each extended attribute; or OSError."""
    if not hasattr(os, 'listxattr') or not os.path.isdir('/proc/self/fd'):
        return
    where = b'/proc/self/fd/%d/%b' % (folder.get(), name)
    try:
        names = os.listxattr(where, follow_symlinks=False)
        for text in names:
            yield os.fsencode(text), os.getxattr(where, text,
                                                 follow_symlinks=False)
    except OSError as e:
        if e.errno not in NO_XATTRS:
            raise


def mode_diff(remote, opt):
    """--diff: the number of differences and errors."""
    live = history_live(remote, opt)
    fetcher = Fetcher(remote)
    try:
        records = [archive_find(remote, live, name, opt, fetcher)
                   for name in opt.names]
        diff = Diff(fetcher, opt)
        if len(records) == 2:
            diff.run(diff.archives(*records))
        else:
            opt.quiet = True        # what the walk says is of storing
            diff.run(diff.disk(records[0]))
            diff.errors += unmatched(diff.patterns)
    finally:
        fetcher.close()
    opt.found = not diff.errors
    return diff.errors + sum(diff.counts.values())


##############################################################################
# Verify: whether everything can be read
#
# Reads index blocks first, each once however many archives have it, then the
# chunks they name.  Names are keyed hashes, spread evenly, so a share of the
# chunks is a range of names, and where the last run ended is all that has to
# be remembered.  Writes nothing but that.
##############################################################################

NAME_BITS = 256
NAMES_END = 1 << NAME_BITS
VERIFIED = 'verified'       # in the cache directory: where to go on


class Verifier:
    """Reads archives; knows which blocks are damaged."""

    def __init__(self, fetcher):
        import sqlite3
        self.fetcher = fetcher
        self.damaged = {}       # name of a block -> message
        self.blocks = self.bytes = 0    # read
        # As many as there are: in a temporary file, not in memory.
        self.db = sqlite3.connect('', isolation_level=None)
        self.db.execute('CREATE TABLE seen(name BLOB UNIQUE, chunk INTEGER, '
                        'plain INTEGER)')
        self.db.execute('BEGIN')

    def new(self, kid):
        """True for a block that was not met before."""
        return self.db.execute(
            'INSERT OR IGNORE INTO seen VALUES (?, ?, ?)',
            (kid.name, kid.cls == CHUNK, kid.plain)).rowcount == 1

    def read(self, kids, get, window):
        """(kid, what `get` makes of its slot) for each that is whole."""
        for slot, kid in self.fetcher.ahead(
                ((kid, False, kid) for kid in kids), window):
            self.blocks += 1
            self.bytes += kid.plain
            try:
                value = get(slot)
            except CorruptError as e:
                self.damaged[kid.name] = str(e)
                continue
            yield kid, value

    def index(self, kids, level):
        """The lists and pages below `kids`, which are new."""
        kind = PAGE_LIST if level else PAGE
        below = self.list_check if level else self.page_check
        for kid, block in self.read(
                filter(self.new, kids),
                lambda slot: index_get(slot, kind, level), INDEX_WINDOW):
            try:
                below(block)
            except CorruptError as e:
                self.damaged[kid.name] = str(e)

    def list_check(self, block):
        list_notes(block)
        self.index(block.kids, block.level - 1)

    def page_check(self, page):
        """Rows that can be read, and the blocks that they name."""
        lists = {}
        for entry in page_rows(page):
            for number in entry.lists:
                lists[number] = entry.level
            extents_check(page, entry.extents)
        for number, kid in enumerate(page.kids):
            if number in lists:
                self.extents([kid], lists[number])
            elif kid.cls == CHUNK:
                self.new(kid)

    def extents(self, kids, level):
        """The lists of one large file."""
        for kid, block in self.read(
                filter(self.new, kids),
                lambda slot: index_get(slot, EXTENT_LIST, level),
                INDEX_WINDOW):
            try:
                if level > 1:
                    self.extents(block.kids, level - 1)
                    continue
                extents_check(block, list_extents(block))
            except CorruptError as e:
                self.damaged[kid.name] = str(e)
                continue
            for chunk in block.kids:
                self.new(chunk)

    def chunks(self, low, high):
        """Read the chunks with names from `low` up to `high`, integers."""
        rows = self.db.execute(
            'SELECT name, plain FROM seen WHERE chunk AND name >= ? AND '
            'name <= ? ORDER BY rowid', (name_of(low), name_of(high - 1)))
        for _ in self.read((Kid(CHUNK, *row) for row in rows), Slot.get,
                           FETCH_WINDOW):
            pass

    def end_of(self, low, share):
        """Where a share that begins at `low` ends: bytes or a fraction."""
        if isinstance(share, float):
            return min(NAMES_END, low + (int(share * 2 ** 64) + 1
                                         << NAME_BITS - 64))
        total = 0
        for name, plain in self.db.execute(
                'SELECT name, plain FROM seen WHERE chunk AND name >= ? '
                'ORDER BY name', (name_of(low),)):
            total += plain
            if total >= share:
                return int.from_bytes(name, 'big') + 1
        return NAMES_END

    # Which files a damaged block is part of.

    def lost(self, kids, level):
        """(path or None, block) of what cannot be read below `kids`."""
        for kid in kids:
            if kid.name in self.damaged:
                yield None, kid.name
            elif level:
                block = self.fetcher.get(kid)
                yield from self.lost(block.kids, level - 1)
            else:
                page = self.fetcher.get(kid)
                for entry in page_rows(page):
                    for name in self.entry_lost(entry, page):
                        yield entry.path, name

    def entry_lost(self, entry, page):
        """The damaged blocks of an entry."""
        numbers = [extent[0] for extent in entry.extents
                   if extent[0] != HOLE] + [
                       value for _, value in entry.xattrs
                       if isinstance(value, int)]
        for number in numbers:
            if page.kids[number].name in self.damaged:
                yield page.kids[number].name
        yield from self.lists_lost([page.kids[number]
                                    for number in entry.lists], entry.level)

    def lists_lost(self, kids, level):
        """The same among the blocks of a large file."""
        for kid in kids:
            if kid.name in self.damaged:
                yield kid.name
            elif level:
                yield from self.lists_lost(self.fetcher.get(kid).kids,
                                           level - 1)


def name_of(number):
    """A number as the name of a block."""
    return number.to_bytes(NAME_BITS // 8, 'big')


def extents_check(block, extents):
    """CorruptError if an extent of `block` reaches over a chunk's end."""
    for number, offset, length, _ in extents:
        if number != HOLE and offset + length > block.kids[number].plain:
            raise CorruptError('index block %s: an extent reaches over the '
                               'end of its chunk' % block.name.hex()[:16])


def verified_read(cachedir):
    """Where the last share ended; 0 if none is known."""
    try:
        with open(os.path.join(cachedir, VERIFIED)) as file:
            text = file.read(100).strip()
    except FileNotFoundError:
        return 0
    if not re.fullmatch('[0-9a-f]{64}', text):
        warn('Cache directory %s: %s is damaged; verifying begins anew'
             % (cachedir, VERIFIED))
        return 0
    return int(text, 16)


def verified_write(cachedir, end):
    """Remember it; whole or not at all."""
    cache_note(cachedir, VERIFIED, b'%064x\n' % (end % NAMES_END))


def verify_records(remote, live, opt, output):
    """(records to verify, number of those that cannot be read)."""
    chosen, titles = live, {}
    for name in opt.names:
        archive = Names(remote.key).archive(name)
        if archive not in live:
            raise Missing(name)
        titles[archive] = name
    if titles:
        chosen = {archive: live[archive] for archive in titles}
    errors = []
    found = dict(archive_records(remote, chosen, errors.append))
    if errors:                  # unless it was deleted meanwhile
        live = history_live(remote, opt)
    lost = [archive for archive in sorted(set(chosen) - set(found))
            if live.get(archive) == chosen[archive]]
    why = damage_where(remote, {
        chosen[archive][0]: 'archive record %s: the archive whose hash is %s '
        'is lost' % (chosen[archive][0].hex()[:16], archive.hex())
        for archive in lost})
    for archive in lost:
        record = chosen[archive][0]
        damage_print(output, opt, titles.get(archive, b''), None, record,
                     why[record])
    return sorted(found.values(), key=lambda record: (
        record.created, record.title)), len(lost)


def damage_print(output, opt, title, path, block, message):
    """One line of --verify: archive, path, and what is wrong."""
    if opt.json:
        fields = {'type': 'damage', 'archive': title, 'block': block.hex(),
                  'message': os.fsencode(message)}
        if path is not None:
            fields['path'] = path
        output.put(json_line(fields))
        return
    output.put(b'\t'.join((path_escape(title), path_escape(path or b''),
                           os.fsencode(message))))


def damage_report(verifier, remote, records, opt, output):
    """Name the files that are lost; archives deleted meanwhile have none."""
    live = history_live(remote, opt)
    kept = [record for record in records
            if live.get(record.archive, (b'',))[0] == record.name]
    named = set()
    verifier.damaged = damage_where(remote, verifier.damaged)
    for record in kept:
        last = None
        for path, block in verifier.lost(record.kids, record.level):
            named.add(block)
            if path is not None and path == last:
                continue        # one line for each file
            last = path
            message = verifier.damaged[block]
            if path is None:
                message += '; the entries it holds are lost'
            damage_print(output, opt, record.title, path, block, message)
    for block in sorted(set(verifier.damaged) - named):
        if len(kept) < len(records):
            del verifier.damaged[block]     # of what was deleted
        else:
            damage_print(output, opt, b'', None, block,
                         verifier.damaged[block] + '; no file needs it')


def mode_verify(remote, opt):
    """--verify: the number of damaged blocks."""
    share, low, high = opt.verify_share, 0, NAMES_END
    output = Output(1)
    fetcher = Fetcher(remote, openers_make(remote.key))
    try:
        live = history_live(remote, opt)
        records, lost = verify_records(remote, live, opt, output)
        verifier = Verifier(fetcher)
        for record in records:
            verifier.index(record.kids, record.level)
        if share:
            low = verified_read(opt.cachedir)
            high = verifier.end_of(low, share)
        verifier.chunks(low, high)
        if verifier.damaged:
            damage_report(verifier, remote, records, opt, output)
    finally:
        fetcher.close()
    if share:
        verified_write(opt.cachedir, high)
    verify_summary(output, opt, verifier, len(records), lost, low, high)
    return len(verifier.damaged) + lost


def verify_summary(output, opt, verifier, archives, lost, low, high):
    """The last line: what was read."""
    damaged = len(verifier.damaged) + lost
    if opt.json:
        output.put(json_line({
            'type': 'summary', 'archives': archives + lost,
            'blocks': verifier.blocks, 'bytes': verifier.bytes,
            'damaged': damaged, 'from': low / NAMES_END,
            'to': high / NAMES_END}))
    elif damaged or not opt.quiet:
        text = 'Verified %s, %s, of %s: %s damaged' % (
            plural(verifier.blocks, 'block'), plural(verifier.bytes, 'byte'),
            plural(archives + lost, 'archive'), damaged or 'none')
        if opt.verify_share:
            text += '; file data from %.1f%% to %.1f%%' % (
                100 * low / NAMES_END, 100 * high / NAMES_END)
        output.put(text.encode())
    output.flush()


##############################################################################
# Modes that write: create, delete, nuke; statistics, usage
#
# Each mode_*() does one mode whole and returns the exit status.  Prints what
# its users parse; decides what is retried and what is given up.
##############################################################################


def remote_open(opt, roles):
    """The Remote of the key in `opt`, proving those of `roles` it has."""
    roles = [role for role in roles if opt.key.can(role)]
    remote = Remote(opt.key, roles, opt.server, opt.retry_forever,
                    opt.noisy_warnings)
    remote.limits = opt.limits
    return remote


def roles_to_write(key):
    """To write, and to read the references of what others wrote."""
    return (ROLE_WRITE, ROLE_READ if key.can(ROLE_READ) else ROLE_DELETE)


def cache_open(opt):
    """The cache directory, locked."""
    return Cache(opt.cachedir, opt.key, wait=opt.lock_wait)


def cache_begin(opt, cache, remote, memo=None):
    """Bring a cache up to the server, or say that --fsck must."""
    remote.connect()
    if pending_exists(cache):
        pending_decide(remote, cache, memo)
    if cache.damaged:
        raise UserError('Directory is not consistent with archive: Run --fsck'
                        ' (blocks on the server are damaged)')
    if cache.new and remote.head[0] and remote.archives:
        raise UserError('Sequence number mismatch: Run --fsck (cache '
                        'directory %s is empty, but the server has archives '
                        'of this machine)' % opt.cachedir)
    synchronize(remote, cache)
    if ROLE_WRITE in remote.proven:
        parts_settle(remote, cache)


def exists_error(name):
    return UserError('An archive already exists with the name "%s"'
                     % show(name))


MAXBW_NEAR = 16 * MIB       # more than there ever is between read and sent


class Truncated(Exception):
    """The archive is to end here: by SIGQUIT, or after --maxbw bytes."""


class Create:
    """One run of -c."""

    def __init__(self, opt):
        self.opt = opt
        self.name = self.title = opt.names[0]   # `title`: as it was stored
        self.writer = self.progress = None
        self.terminal = QuitKey()
        self.cut_at = None              # entries at which it was truncated
        self.cache = self.memo = self.txn = self.remote = None
        self.reader = self.merger = None    # for operands @@NAME
        self.consumed = set()               # pipes among operands @FILE
        self.stdin_start = None             # offset, where it is a file
        self.last_bytes = 0             # sent at the last checkpoint
        self.last_time = time.monotonic()

    def open(self):
        """Reach the server, catch up, begin; raises before any read."""
        opt, key = self.opt, self.opt.key
        self.merge_need()
        self.cache = cache_open(opt)
        self.memo = Memo(opt.cachedir)
        self.remote = remote_open(opt, roles_to_write(opt.key))
        cache_begin(opt, self.cache, self.remote, self.memo)
        names = Names(key)
        guard = [names.archive(self.name), names.archive(self.name + b'.part')]
        if any(archive in self.cache.archives() for archive in guard):
            raise exists_error(self.name)
        self.merge_open(self.cache.archives)
        self.txn = Transaction(self.remote, self.cache, guard)
        self.txn.limit_memory(opt.memory, self.memo.db)
        try:
            self.txn.begin()
        except Refused as e:
            if e.code == E_EXISTS:
                raise exists_error(self.name) from None
            raise

    def merge_need(self):
        """UserError if operands @@NAME need what the key cannot do."""
        if any(kind == 'archive' for kind, _ in self.opt.items):
            if not self.opt.key:
                raise UserError('Key file must be specified for operands '
                                '@@NAME')
            self.opt.key.need(ROLE_READ, '-c with operands @@NAME')
            return True
        return False

    def merge_open(self, live):
        """Find the archives to be merged; `live()` has them.

        They are read over a connection of their own: that of the
        transaction is resumed in its own way when it is lost.
        """
        if self.merge_need():
            self.reader = remote_open(self.opt, (ROLE_READ,))
            self.merger = Merge(self.opt, self.reader, live)
            self.merger.open()

    def walk(self, writer):
        return Walk(self.opt.items, self.opt, writer.report,
                    directories_skipped(self.opt))

    def merge(self, writer, walk, kind, folder, name):
        """Take in what an operand that is not walked stands for."""
        if kind == 'command':
            return writer.command(name)
        if kind == 'tar':
            return self.merge_tar(writer, walk, folder, name)
        return self.merger.archive(writer, name)

    def meant(self, folder, name):
        """A hint if `@name` is a file, as where a shell put the operands."""
        try:
            os.stat(b'@' + name, dir_fd=folder.get(), follow_symlinks=False)
        except OSError:
            return ''
        return ' (what is named @%s itself is given as ./@%s)' % (
            show(name), show(name))

    def merge_tar(self, writer, walk, folder, name):
        """Take in the entries of the tar file `name`; `-` is standard input.
        """
        what = 'standard input' if name == b'-' else show(name)
        try:
            fd = os.dup(0) if name == b'-' else os.open(
                name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder.get())
        except OSError as e:
            writer.report('%s: Cannot open: %s%s' % (
                what, e.strerror, self.meant(folder, name)))
            return
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                writer.report('%s: Cannot open: %s%s' % (
                    what, os.strerror(errno.EISDIR), self.meant(folder, name)))
                return
            if not stat.S_ISREG(mode):
                if name in self.consumed:
                    raise UserError('%s cannot be read again, as it would '
                                    'have to be; try again' % what)
                self.consumed.add(name)
            elif name == b'-':
                if self.stdin_start is None:        # behind a passphrase
                    self.stdin_start = os.lseek(fd, 0, os.SEEK_CUR)
                os.lseek(fd, self.stdin_start, os.SEEK_SET)
            yield from TarInput(self.opt, writer, fd, what,
                                lambda path: walk.strip(path)[1]).run()
        finally:
            os.close(fd)

    def start(self, writer, memo):
        """Listen to signals, and say how far it is."""
        writer.profile = create_profile(self.opt)
        self.writer, self.progress = writer, writer.progress
        entries, size = memo.expected(writer.profile) if memo else (0, 0)
        self.terminal.take()
        self.progress.start(entries * ENTRY_SIZE + size)

    def store(self, writer):
        """Walk and commit, over again when a conflict or a server asks."""
        series = self.opt.series or series_of(self.name)
        while True:
            walk = self.walk(writer)
            try:
                state = self.run(writer, walk,
                                 lambda: self.checkpoint(writer, series))
                if not writer.entries and not self.opt.quiet:
                    warn('Archive contains no files')
                self.txn.commit(
                    lambda base: writer.record(base, self.title, series,
                                               state == COMPLETE),
                    state, self.memo, writer.profile)
                return
            except Restart:
                writer.crew.drop()
                self.txn.again()
                writer.start_over()
            finally:
                walk.close()

    def run(self, writer, walk, checkpoint=None):
        """Take in everything, or as much as there is to be; COMPLETE or
        PARTIAL.
        """
        try:
            writer.run(walk, self.due, checkpoint,
                       lambda *what: self.merge(writer, walk, *what))
            return COMPLETE
        except Truncated:
            self.cut_at = self.progress.entries
            self.title = self.name + b'.part'
            writer.cut()
            return PARTIAL

    def report(self, writer):
        """What is said once it is stored, before statistics; exit status."""
        self.progress.finish()
        if self.opt.totals and not writer.errors:
            sys.stderr.write('Total bytes written: %d\n'
                             % self.progress.bytes)
        if self.cut_at is not None:
            warn('Archive truncated')
        return 1 if writer.errors or self.cut_at is not None else 0

    def due(self):
        """True if it is time for a checkpoint; raises Truncated if it is
        time to stop.  A walk that is done over stops where it did before.
        """
        asked, sent = self.progress, self.txn.sent_bytes if self.txn else 0
        if (asked.stop_asked or self.txn and self.used_up()) and \
                asked.entries >= (self.cut_at or 0):
            raise Truncated
        if not self.txn:
            return False
        if asked.checkpoint_asked:
            asked.checkpoint_asked = False
            return True
        most = self.opt.checkpoint_bytes
        crew = self.writer.crew
        if most and crew.bytes and \
                sent + crew.bytes - self.last_bytes >= most:
            crew.finish()               # how much of it is to be sent?
            sent = self.txn.sent_bytes
        return bool(most) and sent > self.last_bytes and (
            sent - self.last_bytes >= most
            or time.monotonic() - self.last_time >= CHECKPOINT_SECONDS)

    def used_up(self):
        """True if --maxbw bytes were sent; near the end each job is waited
        for, so that little more is.
        """
        most = self.opt.maxbw
        if most is None:
            return False
        if self.txn.sent_bytes + MAXBW_NEAR >= most:
            self.writer.crew.finish()
        return self.txn.sent_bytes >= most

    def checkpoint(self, writer, series):
        """Commit what there is as NAME.part."""
        if self.opt.verbose:
            note('%s: Creating checkpoint...' % warn.program)
        writer.finish_pages(False)
        writer.keep_open()
        self.txn.commit(lambda base: writer.record(
            base, self.name + b'.part', series, False), OPEN, self.memo,
            writer.profile)
        writer.checkpointed()
        if self.opt.verbose:
            note(' done.\n')
        self.last_bytes = self.txn.sent_bytes
        self.last_time = time.monotonic()

    def close(self):
        for thing in (self.progress, self.terminal, self.merger, self.reader,
                      self.remote,
                      self.txn and self.txn.pending, self.memo, self.cache):
            if thing:
                thing.close()


def mode_create(opt):
    """-c: exit status 0, 1 with nothing stored, 2 stored with errors."""
    if all(kind == 'cd' for kind, _ in opt.items):
        raise UserError('No files or directories specified')
    if opt.noatime and not NOATIME:
        warn('--noatime has no effect on this system')
    if opt.dry_run:
        return create_dry(opt)
    opt.key.need(ROLE_WRITE, '-c')
    run = Create(opt)
    crew = crew_make(opt, opt.key)
    try:
        run.open()
        writer = Writer(opt, opt.key, crew, run.txn, run.cache, run.memo)
        run.start(writer, run.memo)
        run.store(writer)
        failed = run.report(writer)
        if opt.print_stats:
            totals = run.cache.totals
            stats = Stats(opt, stats_stream(opt))
            stats.all(totals)
            stats.archive(run.title, 'This archive', totals[4:6],
                          'New data', totals[6:8])
        head_print(opt, run.cache)
        prices_keep(opt, run.remote)
        return 2 if failed else 0
    except Refused as e:
        if e.code == E_EXISTS:
            raise exists_error(run.name) from None
        raise
    except BaseException:
        if run.txn and run.txn.changed:
            opt.changed = True
        raise
    finally:
        crew.close()
        run.close()


def crew_make(opt, key):
    """The workers of a run, before it has a thread; each has some megabytes
    of its own.
    """
    return Crew(key, opt.pad, opt.verify_encode,
                1 if opt.memory == 'verylowmem' else WORKERS_MOST)


def create_dry(opt):
    """-c --dry-run: everything but the server, with or without a key."""
    run = Create(opt)
    key = opt.key or key_make('', '')
    cache = None
    if opt.key and opt.cachedir and opt.dry_run != METADATA \
            and os.path.isfile(os.path.join(opt.cachedir, 'directory')):
        cache = Cache(opt.cachedir, opt.key, wait=opt.lock_wait)
    memo = None
    if cache:
        memo = Memo(opt.cachedir)
    crew = crew_make(opt, key)
    writer = Writer(opt, key, crew, DryRun(cache), cache, memo)
    try:
        run.merge_open(lambda: history_live(run.reader, opt))
        run.start(writer, memo)
        run.run(writer, run.walk(writer))
        if not writer.entries and not opt.quiet:
            warn('Archive contains no files')
        record = writer.record((0, bytes(32)), b'(dry-run)', b'(dry-run)')
        failed = run.report(writer)
        if opt.print_stats:
            sink = writer.sink
            whole = sink.totals(record.name)
            totals = list(cache.totals) if cache else [0] * 9
            stats = Stats(opt, stats_stream(opt))
            stats.all([totals[0] + whole[0], totals[1] + whole[1],
                       totals[2] + sink.new[0], totals[3] + sink.new[1],
                       0, 0, 0, 0, totals[8] + 1])
            stats.archive(opt.names[0], 'This archive', whole,
                          'New data', sink.new)
            cost_print(opt, sink.new[1])
    finally:
        crew.close()
        run.close()
        for thing in (memo, cache):
            if thing:
                thing.close()
    return failed


def create_profile(opt):
    """What pages of two runs must have in common to be candidates first, and
    those of a run before to be given up when a run no longer meets them.

    So it differs for runs that take different parts of a tree, and is the
    same from day to day: commands and contents of lists are not in it.
    """
    digest = hashlib.sha256(FORMAT)
    for kind, value in opt.items:
        if kind == 'command':
            continue
        if kind == 'list' and opt.files_from != '-':
            value = os.fsencode(opt.files_from)
        digest.update(b'%b\0%b\0' % (kind.encode(), value))
    for word in sorted(opt.exclude) + [b''] + sorted(opt.include):
        digest.update(word + b'\0')
    digest.update(repr((opt.absolute, opt.follow_all, opt.follow_operands,
                        opt.recurse, opt.store_atime, opt.nodump,
                        opt.one_file_system, opt.exclude_caches,
                        opt.exclude_if_present,
                        opt.newer is None,
                        [rule.text for rule in opt.rules])).encode())
    return digest.digest()[:8]


# Statistics.

UNIQUE = '  (unique data)'
STATS_KEY = {UNIQUE: 'unique_', 'New data': 'new_',
             'Deleted data': 'deleted_'}


def stats_keys(prefix, pair):
    """(total, compressed) bytes under their keys in JSON."""
    return {prefix + 'total': pair[0], prefix + 'compressed': pair[1]}


def stats_stream(opt):
    """Where -c and -d print statistics; JSON is data, the table is not."""
    return sys.stdout if opt.json else sys.stderr


def csv_write(path, mode, rows):
    """Rows of --csv-file; as those who read it expect, nothing is quoted."""
    try:
        with open(path, mode) as file:
            file.write(os.fsencode(''.join(','.join(row) + '\n'
                                           for row in rows)))
    except OSError as e:
        raise UserError('Cannot write --csv-file %s: %s'
                        % (path, e.strerror)) from None


def csv_check(path):
    """UserError if --csv-file cannot be written: known before the work."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        return
    except FileNotFoundError:
        where = os.path.dirname(os.path.abspath(path))
        if os.access(where, os.W_OK | os.X_OK):
            return
        reason = 'cannot make files in %s' % where
    except OSError as e:
        reason = e.strerror
    raise UserError('Cannot write --csv-file %s: %s' % (path, reason))


class Stats:
    """Where statistics go: the table, to `stream`; or --csv-file instead.

    The table's bytes, and the rows of the CSV file, are parsed by others.
    """

    def __init__(self, opt, stream):
        self.opt = opt
        self.stream = stream
        self.number = humanize if opt.humanize_numbers else str

    def all(self, totals):
        """All archives; begins the table, and the CSV file anew."""
        if self.opt.json:
            self.write(json_line({
                'type': 'statistics', 'archives': totals[8],
                **stats_keys('', totals[0:2]),
                **stats_keys('unique_', totals[2:4])}) + b'\n')
            return
        head = 'Archive name' if self.opt.csv_file else ''
        self.rows([(head, 'Total size', 'Compressed size')] + self.texts(
            ('All archives', totals[0:2]), (UNIQUE, totals[2:4])), 'wb')

    def archive(self, name, title, whole, label, part):
        """Archive `name`, called `title` in tables: (total, compressed) of
        all of it, and of that `part` of it that is `label`.
        """
        if self.opt.json:
            self.write(json_line({
                'type': 'archive_statistics', 'name': name,
                **stats_keys('', whole),
                **stats_keys(STATS_KEY[label], part)}) + b'\n')
            return
        self.rows(self.texts((title, whole), (label, part)), 'ab')

    def texts(self, *rows):
        return [(name, self.number(pair[0]), self.number(pair[1]))
                for name, pair in rows]

    def rows(self, rows, mode):
        if self.opt.csv_file:
            csv_write(self.opt.csv_file, mode, rows)
        elif self.opt.null_output:
            self.write(b''.join(os.fsencode('\0\0'.join(row) + '\0')
                                for row in rows))
        else:
            self.write(b''.join(os.fsencode('%-32s  %15s  %15s\n' % row)
                                for row in rows))

    def write(self, data):
        if self.stream is sys.stdout:
            stdout_write(os.fsdecode(data))
        elif self.stream is not None:
            self.stream.write(os.fsdecode(data))
            self.stream.flush()


# What is used, and what it costs.

PRICES = 'prices'           # in the cache directory: what FIGURES last said
PRICE_NAMES = ('price-storage', 'price-upload', 'price-download')
FIGURES_MOST = 4096         # bytes
# A line of FIGURES, by what a name is; of all others it is a number.
FIGURE = re.compile(r'([a-z-]{1,40}) ([ -~]{1,60})', re.A)
FIGURE_KINDS = {
    name: re.compile(form, re.A) for name, form in (
        ('first-day', '[0-9]{4}-[0-9]{2}-[0-9]{2}'),
        ('last-day', '[0-9]{4}-[0-9]{2}-[0-9]{2}'), ('standing', '[a-z]+'))}
FIGURE_NUMBER = re.compile('-?[0-9]{1,40}', re.A)


def figures_parse(body, *needed):
    """{name: number or text} in FIGURES; CorruptError if it is not well
    formed, or says a price but not all that is `needed` beside it.
    """
    figures = {}
    try:
        text = body.decode('ascii') if len(body) <= FIGURES_MOST else '?'
        for line in text.split('\n')[:-1]:
            name, value = FIGURE.fullmatch(line).groups()
            form = FIGURE_KINDS.get(name, FIGURE_NUMBER)
            figures[name] = form.fullmatch(value).group()
            if form is FIGURE_NUMBER:
                figures[name] = int(value)
        figures['machine-bytes']
        for name in PRICE_NAMES + needed if PRICE_NAMES[0] in figures else ():
            figures[name]
        return figures
    except (UnicodeDecodeError, AttributeError, KeyError):
        raise CorruptError('The server\'s answer to ACCOUNT is malformed') \
            from None


def prices_keep(opt, remote):
    """Note for dry runs what the server charges, after a run that reached it.

    Nothing that fails here is worth a word: the archive is stored.
    """
    path = os.path.join(opt.cachedir, PRICES)
    try:
        figures = {}
        if remote.charges:
            if not remote.channel or remote.channel.failed:
                return                  # it is not reached again for that
            figures = figures_parse(remote.channel.call(ACCOUNT, b'\0')[1])
        text = ''.join('%s %d\n' % (name, figures[name])
                       for name in PRICE_NAMES if name in figures)
        if text:
            cache_note(opt.cachedir, PRICES, text.encode())
        elif os.path.exists(path):
            os.unlink(path)
    except (RemoteError, CorruptError, OSError):
        pass


def prices_known(opt):
    """What prices_keep() noted as figures; {} if there is nothing."""
    try:
        with open(os.path.join(opt.cachedir or '', PRICES), 'rb') as file:
            return figures_parse(b'machine-bytes 0\n'
                                 + file.read(FIGURES_MOST))
    except (OSError, CorruptError):
        return {}


def cost_print(opt, stored):
    """What `stored` bytes more would cost, by the prices of the last run.

    After the table, whose bytes are others', and not with --quiet.
    """
    prices = prices_known(opt) if opt.cachedir else {}
    if PRICE_NAMES[0] not in prices:
        return
    month, once = [stored * prices[name] for name in PRICE_NAMES[:2]]
    if opt.json:
        stdout_write(json_line({
            'type': 'cost', 'month': money_exact(month),
            'upload': money_exact(once)}).decode() + '\n')
    elif not opt.quiet:
        sys.stderr.write('New data would cost %s a month, and %s to send\n'
                         % (money(month), money(once)))


def money(amount):
    """Attodollars as a person reads them: rounded down."""
    amount //= 10 ** 12
    return '%s$%d.%06d' % (('-' if amount < 0 else '',)
                           + divmod(abs(amount), 10 ** 6))


def money_exact(amount):
    """Attodollars as dollars, all 18 digits."""
    return '%s%d.%018d' % (('-' if amount < 0 else '',)
                           + divmod(abs(amount), 10 ** 18))


USED = ('stored', 'up', 'down', 'charged')


def mode_usage(opt):
    """--usage: what is stored and used, and how long the money lasts."""
    roles = [role for role in (ROLE_READ, ROLE_DELETE, ROLE_NUKE, ROLE_WRITE)
             if opt.key.can(role)][:1]
    remote = remote_open(opt, roles)
    try:
        remote.connect()
        try:
            body = remote.channel.call(ACCOUNT, b'\1')[1]
        except Refused as e:
            if e.code == E_BAD:
                raise UserError('The server is older than --usage') from None
            raise
        figures = figures_parse(
            body, 'standing', *('machine-' + name for name in USED))
        if opt.cachedir:
            prices_keep(opt, remote)
    finally:
        remote.close()
    if 'account-bytes' in figures:
        figures_parse(body, 'account-machines', 'balance',
                      *('account-' + name for name in USED))
    if opt.json:
        stdout_write(json_line(usage_fields(figures)).decode() + '\n')
    else:
        for row in usage_rows(figures,
                              humanize if opt.humanize_numbers else str):
            line = ('%-32s' + '  %15s' * (len(row) - 1)) % row
            stdout_write(line.rstrip() + '\n')
    return 0


def usage_rows(figures, number):
    """The table of --usage: a machine's column, and the account's if the
    server tells that.
    """
    whose = [who for who in ('machine', 'account')
             if who + '-bytes' in figures]

    def row(title, name, show=number):
        return (title,) + tuple(show(figures['%s-%s' % (who, name)])
                                for who in whose)

    rows = [('', 'This machine', 'Account')[:1 + len(whose)],
            row('Stored', 'bytes')]
    if PRICE_NAMES[0] not in figures:
        return rows + [('Charged', 'nothing')]
    rows.append(row('A month of that', 'bytes',
                    lambda size: money(size * figures['price-storage'])))
    if {'first-day', 'last-day'} <= figures.keys():
        rows += [('%s to %s:' % (figures['first-day'], figures['last-day']),),
                 row('  Uploaded', 'up'), row('  Downloaded', 'down'),
                 row('  Charged', 'charged', money)]
    last = ('',) * (len(whose) - 1)
    if last:
        rows += [('Machines', '', str(figures['account-machines'])),
                 ('Balance', '', money(figures['balance']))]
    return rows + [
        ('Days left', *last, str(figures.get('days-left', '-'))),
        ('Standing', *last, figures['standing'])]


def usage_fields(figures):
    """The same for --json."""
    prices = PRICE_NAMES[0] in figures
    fields = {'type': 'usage', 'charged': prices}
    for who in 'machine', 'account':
        if who + '-bytes' not in figures:
            continue
        size = figures[who + '-bytes']
        fields[who] = {'bytes': size}
        if prices:
            _, up, down, charged = [figures['%s-%s' % (who, name)]
                                    for name in USED]
            fields[who].update({
                'month': money_exact(size * figures['price-storage']),
                'byte_days': figures[who + '-stored'], 'uploaded': up,
                'downloaded': down, 'charged': money_exact(charged)})
    if 'account' in fields:
        fields['account'].update({
            'machines': figures['account-machines'],
            'balance': money_exact(figures['balance'])})
    if prices:
        fields.update({
            'prices': {name.partition('-')[2]: money_exact(figures[name])
                       for name in PRICE_NAMES},
            'first_day': figures.get('first-day'),
            'last_day': figures.get('last-day'),
            'days_left': figures.get('days-left'),
            'standing': figures['standing']})
    return fields


def head_print(opt, cache):
    """--print-head: what --expect-head takes on a bare machine."""
    if opt.print_head:
        stdout_write(head_text((cache.n, cache.head)) + '\n')


def release(cache, records):
    """What ceases to exist when `records` are unlinked.

    ([names, parents first], plain, stored).  Blocks that nothing refers to
    any more, from earlier runs, go too but are not counted.  The names hold
    every existing parent of each of them.
    """
    left, dead, sums = {}, {}, [0, 0]       # dead: a set that keeps order
    garbage = [row[0] for row in cache.db.execute(
        'SELECT name FROM blocks WHERE count = 0')]
    for names, wanted in ((garbage, False), (records, True)):
        stack = [(name, cache.find(name)) for name in names]
        dead.update(dict.fromkeys(names))
        while stack:
            name, row = stack.pop()
            if row is None:
                raise inconsistent()
            if wanted:
                sums[0] += row[2] or 0
                sums[1] += row[3]
            if row[0] != 'c':
                stack += release_kids(cache, name, left, dead)
    return list(dead), sums[0], sums[1]


def release_kids(cache, name, left, dead):
    """Count one parent less for the kids of `name`: (name, row) of those
    with none, which are entered in `dead`.  `left` has the parents left of
    those with some, which are few.
    """
    out = []
    for kid in {kid.name for kid in cache.kids(name) or ()}:
        row = None if kid in dead else cache.find(kid)
        if row is None:
            continue
        count = left.pop(kid, row[1])
        if count > 1:
            left[kid] = count - 1
        else:
            dead[kid] = None
            out.append((kid, row))
    return out


def release_check(cache, dead):
    """UserError unless every parent of each of `dead` is among them.

    Counts decide what is deleted; this scan of all references is what a
    count that is wrong, for whatever reason, must get past.  It passes over
    chunks, and takes 0.1 s for each million references.
    """
    gone, first = set(dead), operator.itemgetter(0)
    for name, kids in cache.db.execute(
            'SELECT name, kids FROM blocks INDEXED BY parents '
            'WHERE kids IS NOT NULL'):
        if name not in gone and not gone.isdisjoint(
                map(first, KID_NAME.iter_unpack(kids))):
            raise inconsistent()


class Deletion:
    """A run of -d or --expire: one transaction for each archive."""

    def __init__(self, opt):
        self.opt = opt
        self.cache = self.remote = None
        self.stats = Stats(opt, stats_stream(opt))

    def open(self):
        """Lock the cache directory and bring it up to the server."""
        opt = self.opt
        opt.key.need(ROLE_DELETE, opt.mode)
        self.cache = cache_open(opt)
        self.remote = remote_open(opt, (ROLE_DELETE, ROLE_READ, ROLE_WRITE))
        # To delete, and to undelete, the others only help.
        self.remote.spare = (ROLE_READ, ROLE_WRITE)
        cache_begin(opt, self.cache, self.remote)
        if self.cache.partial:
            raise UserError('Directory is not consistent with archive: Run '
                            '--fsck (blocks of other hosts could not be '
                            'read)')

    def delete(self, name, title, record=None, needs=()):
        """Delete archive `name`, called `title` in statistics; see
        delete_archive().
        """
        if self.opt.verbose:
            note('Deleting archive "%s"\n' % one_line(show(name)))
        whole, freed = delete_archive(self.remote, self.cache, name, record,
                                      needs)
        self.opt.changed = True
        if self.opt.print_stats:
            self.stats.all(self.cache.totals)
            self.stats.archive(name, title, whole, 'Deleted data', freed)

    def close(self):
        if self.remote and self.remote.changed:
            self.opt.changed = True     # whatever went wrong after that
        for thing in (self.remote, self.cache):
            if thing:
                thing.close()


def mode_delete(opt):
    """-d: the archives named, one after the other."""
    run = Deletion(opt)
    try:
        run.open()
        for name in opt.names:
            try:
                run.delete(name, 'This archive' if len(opt.names) == 1
                           else show(name))
            except Missing as e:
                if not opt.keep_going:
                    raise
                warn(str(e))
        head_print(opt, run.cache)
    finally:
        run.close()
    return 0


def delete_archive(remote, cache, name, record=None, needs=()):
    """Delete one archive; ((total, stored) of it, (plain, stored) freed).

    Only the one whose record is `record`, if that is given, and only while
    the archives with the ids `needs` exist.  Durable on return.  A conflict
    or a lost connection recomputes the whole set on the newest base; if the
    lost commit was ours, that shows there.
    """
    archive = Names(cache.key).archive(name)
    sent = None
    while True:
        changes = []
        for change in history_changes(remote, cache_base(remote, cache)):
            changes.append(change)
            if sent and change.hash == sent[0]:
                cache.catch_up(changes)
                return sent[1]
        cache.catch_up(changes)
        if cache.key.refs_priv:
            read_missing(remote, cache)
        live = cache.archives()
        row = live.get(archive)
        if row is None or (record and row[0] != record):
            raise Missing(name)
        if not all(other in live for other in needs):
            raise UserError('Another host deleted archives that were to be '
                            'kept; nothing more is deleted')
        try:
            sent = delete_once(remote, cache, archive, row[0])
        except ChannelLost as e:
            sent = getattr(e, 'sent', sent)


def delete_once(remote, cache, archive, record):
    """One attempt; (hash of its commit, figures), whatever became of it."""
    dead, plain, stored = release(cache, [record])
    release_check(cache, dead)
    whole = cache.total(record)
    totals = list(cache.totals)
    subtract(totals, whole)
    for row in map(cache.find, dead):
        totals[2] -= row[2] or 0
        totals[3] -= row[3]
    archives = cache.archives()
    del archives[archive]
    totals[4:] = (*whole, plain, stored, len(archives))
    commit, raw = delete_commit(cache, [(archive, record)], dead, archives,
                                totals)
    sent = (sha256(raw), (whole, (plain, stored)))
    try:
        delete_send(remote, cache, commit, dead, raw)
    except ChannelLost as e:
        e.sent = sent
        raise
    except Refused as e:
        if e.code not in (E_CONFLICT, E_EXPIRED):
            raise
    return sent


def delete_commit(cache, unlinked, dead, archives, totals):
    """(Commit, C_n) that unlinks and deletes; `archives` stay."""
    commit = Commit(cache.key.machine, cache.n + 1, cache.head, KIND_DELETE,
                    os.urandom(16))
    commit.unlinked += unlinked
    commit.deleted = counted(sorted(dead))
    commit.live = live_digest(archives)
    commit.note = note_seal(cache.key, commit.n, [max(0, n) for n in totals])
    return commit, commit_pack(commit, cache.key)


def delete_decided(remote, cache, dead, commit, raw):
    """Send a delete until it is decided; False if it is dead."""
    while True:
        try:
            delete_send(remote, cache, commit, dead, raw)
        except ChannelLost:
            pass
        except Refused as e:
            if e.code not in (E_CONFLICT, E_EXPIRED):
                raise
            return bool(commit_decided(remote, (cache.n, cache.head), raw))
        found = commit_decided(remote, (cache.n, cache.head), raw)
        if found is not None:
            return bool(found)


def delete_send(remote, cache, commit, dead, raw):
    """BEGIN, the names, COMMIT."""
    channel = remote.connect()
    transaction_open(channel, KIND_DELETE, commit.tid, bytes(16),
                     (cache.n, cache.head))
    for start in range(0, len(dead), CEILING['names']):
        channel.push(DELETE, names_join(dead[start:start + CEILING['names']]))
    transaction_commit(channel, raw)
    remote.changed = True


class Expire:
    """One run of --expire."""

    def __init__(self, opt):
        self.opt = opt
        self.errors = []            # records that cannot be read
        self.archives = []          # Dated

    def read(self, remote, live):
        """Every archive of `live`, or of --series among them."""
        series = self.opt.series and Names(self.opt.key).series(
            self.opt.series)
        now = time.time()
        for archive, record in archive_records(remote, live,
                                               self.errors.append):
            if not series or record.series == series:
                self.archives.append(dated_make(archive, record,
                                                live[archive], self.opt, now))

    def judge(self):
        """Apply the rules."""
        opt = self.opt
        rules = {rule: getattr(opt, 'keep_' + rule) or 0 for rule in RULES}
        retention(self.archives, rules, opt.keep_within)

    def tell(self):
        """What becomes of each archive, on standard output."""
        output = Output(1, b'\0' if self.opt.null_output else b'\n')
        between = b'\0\0' if self.opt.null_output else b'\t'
        for dated in retention_lines(self.archives):
            if self.opt.json:
                output.put(json_line({
                    'type': 'retention', 'name': dated.title,
                    'created': json_time(dated.created * BILLION),
                    'received': json_time(dated.received * BILLION),
                    'kept': dated.kept, 'why': dated.why().partition(
                        ': ')[2]}))
            else:
                output.put(between.join((
                    dated.title, date_text(dated.time),
                    dated.why().encode())))
        output.flush()

    def doubts(self):
        """Say what could not be judged; on every run, for it piles up."""
        count = sum(dated.doubt.startswith('created')
                    for dated in self.archives)
        if count and not self.opt.quiet:
            warn('Kept %s received over 26 hours from %s creation (see '
                 '--dry-run; --by-creation goes by creation times)'
                 % (plural(count, 'archive'),
                    'its' if count == 1 else 'their'))
        for error in self.errors:
            warn('%s; its archive is kept' % error)

    def delete(self, run):
        """Delete, the oldest first, what no rule keeps."""
        newest = {}
        for dated in self.archives:
            if dated.reasons and (dated.series not in newest or dated.time >
                                  newest[dated.series].time):
                newest[dated.series] = dated
        for dated in sorted(self.archives, key=lambda d: d.time):
            if not dated.kept:
                try:
                    run.delete(dated.title, show(dated.title), dated.record,
                               [newest[dated.series].archive])
                except Missing:
                    pass            # another host was faster


RULES = ('last', *PERIODS)


def mode_expire(opt):
    """--expire: delete what no rule keeps."""
    expire = Expire(opt)
    if not opt.keep_within and not any(getattr(opt, 'keep_' + rule)
                                       for rule in RULES):
        raise UserError('--expire needs a rule: --keep-last, --keep-within, '
                        + ', '.join('--keep-' + rule for rule in PERIODS))
    if opt.dry_run:
        return expire_dry(opt, expire)
    run = Deletion(opt)
    try:
        run.open()
        expire.read(run.remote, run.cache.archives())
        expire.judge()
        if opt.verbose:
            expire.tell()
        expire.doubts()
        expire.delete(run)
        head_print(opt, run.cache)
    finally:
        run.close()
    if expire.errors:
        return 2 if opt.changed else 1
    return 0


def expire_dry(opt, expire):
    """--expire --dry-run: needs no cache directory, and deletes nothing."""
    if not opt.key.can(ROLE_DELETE):
        opt.key.need(ROLE_READ, '--expire --dry-run')
    remote = remote_open(opt, (ROLE_READ if opt.key.can(ROLE_READ)
                               else ROLE_DELETE,))
    try:
        expire.read(remote, history_live(remote, opt))
    finally:
        remote.close()
    expire.judge()
    expire.tell()
    expire.doubts()
    return 1 if expire.errors else 0


class Gone:
    """An archive that was deleted, as the history tells it."""

    __slots__ = ('archive', 'record', 'lineage', 'state', 'n', 'time')

    def __init__(self, archive, link, change):
        self.archive = archive          # id
        self.record, self.lineage, self.state = link[:3]
        self.n = change.commit.n        # who deleted it
        self.time = change.time         # and when, by the server's clock


def history_gone(remote):
    """{archive id: Gone} of all archives that delete and nuke keys deleted
    and that are not live now; from the whole history.
    """
    archives, gone = {}, {}
    for change in history_changes(remote, (0, remote.key.genesis()), False):
        commit = change.commit
        lost = [link[0] for link in commit.unlinked]
        if commit.kind == KIND_NUKE:
            lost = list(archives)
        if KIND_ROLE[commit.kind] in (ROLE_DELETE, ROLE_NUKE):
            gone.update((archive, Gone(archive, archives[archive], change))
                        for archive in lost if archive in archives)
        archives_apply(archives, change)
        for link in commit.linked:
            gone.pop(link[0], None)
    return gone


class Revival:
    """What an archive that was deleted needs: what of it still exists, and
    what must be brought back, which is asked of the server in passing.
    """

    def __init__(self, remote, cache, gone):
        self.channel = remote.connect()
        self.cache = cache              # up to date and whole
        self.gone = gone
        self.record = None              # Record
        self.blocks = {}    # name -> [class, plain, stored, kids], to revive
        self.opener, self.names = Opener(cache.key), Names(cache.key)

    def walk(self):
        """Everything the record reaches that does not exist, from above; on
        an open transaction.  Refused if some of it is kept no more.
        """
        level = {self.gone.record: None}
        while level:
            names, below = list(level), {}
            for i in range(0, len(names), 512):
                self.revive({name: level[name] for name in names[i:i + 512]})
                for name in names[i:i + 512]:
                    for kid in self.blocks[name][3]:
                        if kid.name not in self.blocks and \
                                self.cache.find(kid.name) is None:
                            below[kid.name] = kid.plain
            level = {name: plain for name, plain in below.items()
                     if name not in self.blocks}

    def revive(self, some):
        """Have the server bring back `some`, {name: plain length or None},
        and read what they refer to.
        """
        rows = []
        for kind, body in self.channel.stream(
                self.channel.post(REVIVE, names_join(list(some)))):
            if kind == ADDED:
                rows += rows_unpack(body, ADDED_ROW, 'REVIVE')
        if [row[0] for row in rows] != list(some):
            raise CorruptError('REVIVE: the server brought back something '
                               'else')
        for name, cls, stored in rows:
            self.blocks[name] = [cls, some[name], stored, ()]
        names = [row[0] for row in rows if row[1] != CHUNK]
        if not names:
            return
        for kind, body in self.channel.stream(
                self.channel.post(GET, b'\x05', names_join(names))):
            name = body[:32]
            if kind != BLOCK or name not in some:
                raise CorruptError('The server sent a block nobody asked for')
            self.learn(name, body[32:])

    def learn(self, name, sealed):
        """Enter what an index block or a record refers to."""
        row = self.blocks[name]
        if name == self.gone.record:
            self.record = deleted_record(self.opener, self.names, self.gone,
                                         sealed)
        _, plain, kids = refs_learn(self.opener, self.names, name, row[0],
                                    sealed)
        row[1] = row[1] if plain is None else plain
        row[3] = kids

    def learned(self):
        """[(name, plain length, kids)] of index blocks and the record."""
        return [(name, row[1], row[3]) for name, row in self.blocks.items()
                if row[0] != CHUNK]

    def whole(self):
        """(plain, stored) of the archive, as Cache.total() has them."""
        sums, stack = {}, [self.gone.record]
        while stack:
            _, plain, stored, kids = self.blocks[stack[-1]]
            missing = [kid.name for kid in kids if kid.name in self.blocks
                       and kid.name not in sums]
            if missing:
                stack += missing
                continue
            for kid in kids:
                below = sums.get(kid.name) or self.cache.total(kid.name)
                plain += kid.times * below[0]
                stored += kid.times * below[1]
            sums[stack.pop()] = plain, stored
        return sums[self.gone.record]

    def commit(self):
        """C_n that links the archive again."""
        cache, gone = self.cache, self.gone
        # Nobody writes to an open archive any more.
        state = PARTIAL if gone.state == OPEN else gone.state
        commit = Commit(cache.key.machine, cache.n + 1, cache.head,
                        KIND_UNDELETE, os.urandom(16))
        commit.linked.append((gone.archive, gone.record, gone.lineage, state))
        archives = cache.archives()
        archives[gone.archive] = (gone.record, gone.lineage, state, 0)
        commit.live = live_digest(archives)
        commit.puts = counted(list(self.blocks))
        whole = self.whole()
        back = [sum(row[i] for row in self.blocks.values()) for i in (1, 2)]
        totals = [a + b for a, b in zip(cache.totals, (*whole, *back))]
        commit.note = note_seal(cache.key, commit.n, totals + [
            *whole, *back, len(archives)])
        return commit


def deleted_record(opener, names, gone, sealed):
    """The Record of an archive that was deleted, from its refs view."""
    parts = opener.open(RECORD, gone.record, sealed, refs_only=True)
    if names.record(parts[0]) != gone.record:
        raise CorruptError('archive record %s: its content is another\'s'
                           % gone.record.hex()[:16])
    record = record_unpack(parts, gone.record, opener.key)
    record_check(record, gone.archive, (gone.record, b'', gone.state))
    return record


def undelete_archive(remote, cache, gone):
    """Bring back one archive; its Record.  Durable on return.

    A conflict or a lost connection begins anew on the newest base; if the
    lost commit was ours, the archive is there.
    """
    revival = None
    while True:
        cache.catch_up(history_changes(remote, cache_base(remote, cache)))
        if revival:     # spares reading it again
            cache.learn([row for row in revival.learned()
                         if cache.find(row[0]) and cache.kids(row[0]) is None])
        read_missing(remote, cache)
        row = cache.archives().get(gone.archive)
        if row and revival and row[0] == gone.record:
            return revival.record
        if row:
            raise UserError('Another host has stored an archive of that name '
                            'meanwhile')
        revival = Revival(remote, cache, gone)
        try:
            undelete_once(revival)
            remote.changed = True
        except ChannelLost:
            pass
        except Refused as e:
            if e.code == E_NOBLOCK:
                raise UserError('An archive that commit %d deleted is kept no '
                                'more: %s' % (gone.n, e)) from None
            if e.code not in (E_CONFLICT, E_EXPIRED):
                raise


def undelete_once(revival):
    """One attempt, in a transaction of its own."""
    channel, cache = revival.channel, revival.cache
    tid = os.urandom(16)
    transaction_open(channel, KIND_DELETE, tid, bytes(16),
                     (cache.n, cache.head))
    try:
        revival.walk()
    except (Refused, CorruptError):
        channel.call(ABORT)
        raise
    commit = revival.commit()
    commit.tid = tid
    transaction_commit(channel, commit_pack(commit, cache.key))


def mode_undelete(opt):
    """--undelete: archives that were deleted, back from what is kept."""
    opt.key.need(ROLE_DELETE, opt.mode)
    if opt.dry_run:
        return undelete_dry(opt)
    run = Deletion(opt)
    try:
        run.open()
        for gone in gone_picked(opt, history_gone(run.remote)):
            record = undelete_archive(run.remote, run.cache, gone)
            opt.changed = True
            if opt.verbose:
                note('Undeleted archive "%s"\n'
                     % one_line(show(record.title)))
        head_print(opt, run.cache)
    finally:
        run.close()
    return 0


def gone_picked(opt, gone):
    """Those of `gone` that -f names, or --since-commit; the oldest first."""
    if opt.since_commit is not None:
        return sorted((row for row in gone.values()
                       if row.n >= opt.since_commit),
                      key=lambda row: (row.n, row.archive))
    picked, names = [], Names(opt.key)
    for name in opt.names:
        row = gone.get(names.archive(name))
        if row is not None:
            picked += [row] if row not in picked else []
            continue
        error = UserError('No archive "%s" was deleted' % show(name))
        if not opt.keep_going:
            raise error
        warn(str(error))
    return picked


def undelete_dry(opt):
    """--undelete --dry-run: what could be brought back."""
    remote = remote_open(opt, (ROLE_DELETE,))
    opener, names = Opener(opt.key), Names(opt.key)
    output = Output(1, b'\0' if opt.null_output else b'\n')
    try:
        rows = sorted(history_gone(remote).values(),
                      key=lambda row: (row.n, row.archive))
        if opt.names or opt.since_commit is not None:
            rows = gone_picked(opt, {row.archive: row for row in rows})
        delay = U32.unpack(remote.connect().call(STAT)[1][-4:])[0]
        for gone in rows:
            try:
                found = remote.ask(GET, b'\x05', names_join([gone.record]))
            except Refused as e:
                if e.code != E_NOBLOCK:
                    raise
                continue                # it is kept no more
            record = deleted_record(opener, names, gone, found[0][1][32:])
            output.put(gone_line(opt, gone, record, delay))
        output.flush()
    finally:
        remote.close()
    return 0


def gone_line(opt, gone, record, delay):
    """A deleted archive: name, when, by which commit, and until when it is
    sure to be kept, - if that is over.
    """
    until = gone.time + delay
    if opt.json:
        return json_line({
            'type': 'deleted', 'name': record.title, 'commit': gone.n,
            'deleted': json_time(gone.time * BILLION),
            'kept_until': json_time(until * BILLION)})
    between = b'\0\0' if opt.null_output else b'\t'
    return between.join((
        record.title, date_text(gone.time), b'%d' % gone.n,
        date_text(until) if until > time.time() else b'-'))


def mode_print_stats(opt):
    """--print-stats as a mode: from the cache directory alone, but for the
    names of archives, which it does not hold.
    """
    if opt.names and not opt.key.can(ROLE_DELETE):
        opt.key.need(ROLE_READ, '--print-stats -f')
    cache = Cache(opt.cachedir, opt.key, lock=False, write=False)
    try:
        if cache.new:
            raise UserError('Error reading cache directory %s: it is empty; '
                            '--fsck fills it' % opt.cachedir)
        stats = Stats(opt, sys.stdout)
        stats.all(cache.totals)
        if opt.names and cache.partial:
            raise inconsistent()
        for name, record in stats_archives(opt, cache):
            stats.archive(name, show(name), cache.total(record), UNIQUE,
                          release_own(cache, record))
    finally:
        cache.close()
    return 0


def stats_archives(opt, cache):
    """(name, record's name) of the archives that -f names; '*' is all."""
    if opt.names[:1] == [b'*']:
        yield from stats_everything(opt, cache)
        return
    live, names = cache.archives(), Names(opt.key)
    for name in opt.names:
        row = live.get(names.archive(name))
        if row is not None:
            yield name, row[0]
        elif opt.keep_going:
            warn(str(Missing(name)))
        else:
            raise Missing(name)


def stats_everything(opt, cache):
    """The same for all archives this cache knows, the oldest first."""
    remote = remote_open(opt, (ROLE_READ if opt.key.can(ROLE_READ)
                               else ROLE_DELETE,))
    bad = []
    try:
        found = [record for _, record in
                 archive_records(remote, cache.archives(), bad.append)]
        if bad and remote.head[0] != cache.n:
            raise inconsistent()        # deleted by another host since
    finally:
        remote.close()
    for record in sorted(found, key=lambda r: (r.created, r.title)):
        yield record.title, record.name
    if bad:
        raise bad[0]


def release_own(cache, record):
    """(plain, stored) bytes that exist only for this archive."""
    return release(cache, [record])[1:]


def mode_initialize(opt):
    """--initialize-cachedir: an empty cache directory."""
    if os.path.exists(os.path.join(opt.cachedir, 'directory')):
        raise UserError('Cache directory %s is in use already; --fsck '
                        'rebuilds it' % opt.cachedir)
    os.close(cachedir_lock(opt.cachedir, opt.lock_wait))
    return 0


def mode_recover(opt):
    """--recover: what a dead run left becomes NAME.part."""
    if not opt.key.can(ROLE_WRITE):
        if not opt.key.can(ROLE_NUKE):
            opt.key.need(ROLE_DELETE, '--recover')
        return 0            # what it left is an archive already
    cache = cache_open(opt)
    remote = remote_open(opt, roles_to_write(opt.key))
    try:
        cache_begin(opt, cache, remote)
        if pending_exists(cache):
            Pending(cache.path).remove()
    finally:
        remote.close()
        cache.close()
    return 0


def mode_nuke(opt):
    """--nuke: everything of this machine, after a sentence typed by hand."""
    opt.key.need(ROLE_NUKE, '--nuke')
    note('This deletes all archives of this machine.\n'
         'Please type \'No Tomorrow\' to continue\n')
    if sys.stdin is None or \
            sys.stdin.buffer.readline(100) != b'No Tomorrow\n':
        raise UserError('You didn\'t type \'No Tomorrow\'; nothing was '
                        'deleted')
    remote = remote_open(opt, (ROLE_NUKE,))
    try:
        remote.connect()
        while not nuke_commit(remote, remote.head):
            remote.close()              # somebody committed: a new head
            remote.connect()
        return 0
    finally:
        remote.close()


def nuke_commit(remote, base):
    """Delete all archives, if `base` (n, H_n) is still the newest commit;
    False if it is not.  Durable on return.
    """
    commit = Commit(remote.key.machine, base[0] + 1, base[1], KIND_NUKE,
                    os.urandom(16))
    commit.deleted = (EVERYTHING, bytes(32))
    raw = commit_pack(commit, remote.key)
    while True:
        try:
            remote.connect().call(NUKE, raw)
            return True
        except ChannelLost:
            found = commit_decided(remote, base, raw)
            if found is not None:
                return bool(found)
        except Refused as e:
            found = e.code == E_CONFLICT and commit_decided(remote, base, raw)
            if e.code != E_CONFLICT or found is None:
                raise
            return bool(found)


def mode_print_head(opt):
    """--print-head alone: the head the server shows, checked if possible."""
    roles = [role for role in (ROLE_READ, ROLE_WRITE, ROLE_DELETE, ROLE_NUKE)
             if opt.key.can(role)][:1]
    remote = remote_open(opt, roles)
    try:
        remote.connect()
        if opt.cachedir:
            seen = cache_seen(opt.cachedir, opt.key)
            if seen:
                history_follow(remote, seen, remote.head)
        stdout_write(head_text(remote.head) + '\n')
    finally:
        remote.close()
    return 0


# --last-backup-age: what monitors call its exit statuses.
AGE_OK, AGE_WARNING, AGE_CRITICAL, AGE_UNKNOWN = range(4)
AGE_WORDS = ('OK', 'WARNING', 'CRITICAL', 'UNKNOWN')
AGE_LOOK = 20               # archives that came last: one of them is newest


def mode_last_backup_age(opt):
    """--last-backup-age: one line for a monitor, and its status."""
    if not opt.key.can(ROLE_DELETE):
        opt.key.need(ROLE_READ, opt.mode)
    remote = remote_open(opt, (ROLE_READ,) if opt.key.can(ROLE_READ)
                         else (ROLE_DELETE,))
    try:
        now = time.time()
        found = newest_complete(remote, opt, now)
    finally:
        remote.close()
    opt.found = True            # a status is an answer, not an error
    age, status = None, AGE_CRITICAL
    if found:
        archive, record = found
        age = max(0, int(now) - record.created)
        status = max([AGE_OK] + [word for word, span in (
            (AGE_WARNING, opt.warn_age), (AGE_CRITICAL, opt.max_age))
            if span and age > span[1]])
    return age_say(opt, status, age_text(
        opt, record.title, age) if found else 'there is no archive', dict(
            json_archive(*found) if found else {}, age=age))


def age_unknown(opt, text):
    """The status for what cannot be found out; says so on standard output,
    too, the only place where monitors look.
    """
    return age_say(opt, AGE_UNKNOWN, text, {'age': None})


def age_say(opt, status, text, fields):
    """The line of --last-backup-age, or JSON; `status`."""
    if opt.json:
        fields.update(type='age', status=AGE_WORDS[status].lower())
        text = json_line(fields).decode()
    else:
        text = 'tarsnap %s - %s' % (AGE_WORDS[status], one_line(text))
    try:
        stdout_write(text + '\n')
    except (OSError, UserError) as e:
        warn(str(e))
        return AGE_UNKNOWN              # a status without its line
    return status


def newest_complete(remote, opt, now):
    """(archive id, Record) of the newest archive that is complete, or None.

    Which came last the server says; how old it is its maker has signed.  Of
    one second it is the last by name, as in --list-archives.  An archive of
    tomorrow says nothing of today's backup, and is left out.
    """
    live = history_live(remote, opt)
    series = opt.series and Names(opt.key).series(opt.series)
    latest = sorted((archive for archive, link in live.items()
                     if link[2] == COMPLETE),
                    key=lambda archive: live[archive][3], reverse=True)
    for start in range(0, len(latest), AGE_LOOK):
        some, errors = latest[start:start + AGE_LOOK], []
        best = None
        for archive, record in archive_records(
                remote, {one: live[one] for one in some}, errors.append):
            if series and record.series != series:
                continue
            if record.created > now + DRIFT:
                warn('%s is of %s, which is yet to come; it is left out' % (
                    show(record.title), date_text(record.created).decode()))
            elif not best or (record.created, record.title) > (
                    best[1].created, best[1].title):
                best = archive, record
        if errors:
            raise errors[0]
        if best:
            return best
    return None


def age_text(opt, title, age):
    """What --last-backup-age says of an archive; figures as Nagios reads
    them.
    """
    minutes = age // 60
    days, hours = minutes // 1440, minutes // 60 % 24
    spoken = '%d d %d h' % (days, hours) if days else (
        '%d h %d min' % (hours, minutes % 60))
    return '%s, %s old|age=%ds;%s;%s;0' % (
        show(title), spoken, age, *(span[1] if span else '' for span in (
            opt.warn_age, opt.max_age)))


def mode_read(opt):
    """The modes that change nothing: only errors to decide here."""
    if not (opt.mode == '--list-archives' and opt.key.can(ROLE_DELETE)):
        opt.key.need(ROLE_READ, opt.mode)
    remote = remote_open(opt, (ROLE_READ,) if opt.key.can(ROLE_READ)
                         else (ROLE_DELETE,))
    run = {'-t': mode_list, '-x': mode_extract, '-r': mode_tar,
           '--list-archives': mode_list_archives, '--diff': mode_diff,
           '--verify': mode_verify}[opt.mode]
    try:
        return 1 if run(remote, opt) else 0
    finally:
        remote.close()


##############################################################################
# Fsck: the cache directory made anew, and what is damaged
#
# Everything is read from the server again and believed for its names and
# signatures alone.  A block that is gone for good or is not what was stored
# is damaged, and with it every archive that needs it.  Nothing new may build
# on it, so --fsck ends with an error and the cache remembers its name: whoever
# meets its content again puts it again, which makes the archives whole that
# need it.  --fsck-prune deletes it, with all that refers to it, in one commit.
##############################################################################

def mode_fsck(opt):
    """--fsck and --fsck-prune; GUIs show the progress."""
    key = opt.key
    if opt.letter == 'p':
        key.need(ROLE_READ, opt.mode)
        key.need(ROLE_DELETE, opt.mode)
    if not key.can(ROLE_WRITE) and not key.can(ROLE_DELETE):
        key.need(ROLE_WRITE, opt.mode)
    if opt.read_data:
        key.need(ROLE_READ, '--read-data')
    lock = cachedir_lock(opt.cachedir, opt.lock_wait)
    try:
        machine = cache_meta(opt.cachedir).get('machine')
    except UserError:
        machine = None              # that is what we are here for
    if machine and machine != U64.pack(key.machine):
        warn('Cache directory %s was of the key of another machine; '
             'it is made anew for this one' % opt.cachedir)
    remote = remote_open(opt, (ROLE_WRITE, ROLE_READ, ROLE_DELETE))
    try:
        while not Fsck(opt, remote).run():
            pass                    # another host wrote meanwhile
    finally:
        remote.close()
        os.close(lock)
    return 0


def phase(text):
    stdout_write(text + '\n')


class Fsck:
    """One pass of --fsck or --fsck-prune."""

    def __init__(self, opt, remote):
        self.opt = opt
        self.remote = remote
        self.path = os.path.join(opt.cachedir, 'fsck')
        self.cache = self.fetcher = None
        self.damage = {}            # block name -> what is wrong with it
        self.titles = {}            # record name -> title of the archive

    def run(self):
        """The five phases; False if all has to be done again.

        What there was stays until it can be replaced.
        """
        phase('Phase 1: Verifying the signed history')
        self.remote.connect()
        fsck_seen(self.opt, self.remote)
        self.fetcher = Fetcher(self.remote)
        try:
            self.fresh()
            self.history()
            phase('Phase 2: Verifying the list of archives')
            if self.opt.key.refs_priv:
                self.index('a')
            phase('Phase 3: Reading the index')
            if self.opt.key.refs_priv:
                self.index('i')
            self.cache.gather_end()
            if self.opt.read_data:
                self.chunks()
            phase('Phase 4: Verifying archives are complete')
            doomed = self.archives()
            phase('Phase 5: Identifying unreferenced chunks')
            return self.decide(doomed)
        finally:
            self.close()

    def close(self):
        import shutil
        self.fetcher.close()
        if self.cache:
            self.cache.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def fresh(self):
        """An empty Cache in a directory of its own."""
        import shutil
        shutil.rmtree(self.path, ignore_errors=True)
        os.mkdir(self.path, 0o700)
        self.cache = Cache(self.path, self.opt.key, lock=False)
        self.cache.gather_begin()
        try:
            meta = cache_meta(self.opt.cachedir)
        except UserError:
            meta = {}                   # it cannot be read
        self.cache.meta['lineage'] = meta.get('lineage', b'')

    def history(self):
        """Apply everything that was ever committed."""
        try:
            self.catch_up((0, self.opt.key.genesis()))
        except Refused as e:
            if e.code == E_NOBLOCK:     # so are blocks, nobody knows which
                self.mark()
            raise
        self.cache.gathered_changes()

    def mark(self):
        """Nothing may build on the cache directory as it was."""
        try:
            old = Cache(self.opt.cachedir, self.opt.key, lock=False)
        except UserError:
            return
        try:
            old.damaged = True
            old.save()
        finally:
            old.close()

    def replace(self):
        """Put the new files where the old ones were."""
        where = self.opt.cachedir
        for name in ('pending', 'pending-journal', 'cache', 'cache-journal',
                     'directory-journal'):
            try:
                os.unlink(os.path.join(where, name))
            except FileNotFoundError:
                pass
        for name in ('directory', 'cseq'):
            os.rename(os.path.join(self.path, name),
                      os.path.join(where, name))
        fsync_dir(where)

    def catch_up(self, base):
        """Apply what was committed since `base`; True if anything was."""
        if not self.cache.catch_up(history_changes(self.remote, base)):
            return False
        # What is damaged may have been deleted by another host.
        self.damage = {name: why for name, why in self.damage.items()
                       if self.cache.find(name)}
        return True

    def take(self, slot):
        """The content of a block; None if it is damaged.

        It is looked at twice, as deleting rests on it.  A server that cannot
        read is not a block that is damaged: Unclear ends the run.
        """
        try:
            return slot.get()
        except Unclear:
            raise
        except CorruptError:
            pass
        try:
            return self.fetcher.get(slot.kid)
        except CorruptError as e:
            if isinstance(e, Unclear) or self.fetcher.fatal:
                raise
            self.damage[slot.kid.name] = str(e)
        return None

    # Reading.

    def index(self, cls):
        """Learn what the blocks of class `cls` refer to."""
        while True:
            last = b''
            while True:
                rows = self.unread(cls, last)
                if not rows:
                    break
                self.learn(cls, [row for row in rows
                                 if row[0] not in self.damage])
                last = rows[-1][0]
            self.cache.gathered()
            if not self.catch_up((self.cache.n, self.cache.head)):
                return

    def unread(self, cls, last):
        return self.cache.db.execute(
            'SELECT name, stored FROM blocks WHERE kids IS NULL AND cls = ? '
            'AND name > ? ORDER BY name LIMIT 4096', (cls, last)).fetchall()

    def learn(self, cls, rows):
        """Read and enter the index blocks or records (name, stored length).

        Their plain length is not known, but that they take six times the
        stored one once they are decoded: the window is of these.
        """
        kids = (Kid(cls.encode(), name, max(stored, RECORD_GUESS))
                for name, stored in rows)
        learned, smalls, count = [], [], 0
        for slot, _ in self.fetcher.ahead(
                ((kid, False, None) for kid in kids), INDEX_WINDOW):
            if count > LEARN:
                self.enter(learned, smalls)
                learned, smalls, count = [], [], 0
            block = self.take(slot)
            if block is None:
                continue
            plain = None
            if cls == 'a':
                self.titles[block.name] = block.title
                plain = record_length(block)
            elif block.rows and block.kind == PAGE:
                smalls += page_smalls(block)
            learned.append((slot.kid.name, plain, block.kids))
            count += len(block.kids)
        self.enter(learned, smalls)

    def enter(self, learned, smalls):
        """What blocks refer to, and where the content of each small file is;
        without that all small files would be sent again.
        """
        self.cache.gather(learned)
        self.cache.db.execute('BEGIN IMMEDIATE')
        self.cache.db.executemany(
            'INSERT OR IGNORE INTO small VALUES(?, ?)', smalls)
        self.cache.db.execute('COMMIT')

    def chunks(self):
        """Read every chunk, and say so now and then."""
        where = "FROM blocks WHERE cls = 'c' AND plain"
        count = self.cache.db.execute('SELECT count(*) ' + where
                                      ).fetchone()[0]
        said = time.monotonic()
        kids = (Kid(CHUNK, *row) for row in self.cache.db.execute(
            'SELECT name, plain ' + where))
        for number, (slot, _) in enumerate(self.fetcher.ahead(
                (kid, False, None) for kid in kids), 1):
            self.take(slot)
            if time.monotonic() - said > FLUSH_SECONDS or number == count:
                phase('  Chunk %d/%d...' % (number, count))
                said = time.monotonic()

    # Judging.

    def archives(self):
        """[(archive id, record)] of those that are not whole."""
        live = self.cache.archives()
        lost = self.above(self.damage)
        doomed = []
        self.cache.db.execute('BEGIN IMMEDIATE')    # not one for each total
        for number, (archive, row) in enumerate(
                sorted(live.items(), key=lambda item: item[1][3]), 1):
            phase('  Archive %d/%d...' % (number, len(live)))
            whole = row[0] not in lost
            if not whole:
                doomed.append((archive, row[0]))
            if not self.cache.partial or whole and self.damage:
                self.cache.total(row[0])
        self.cache.db.execute('COMMIT')
        return doomed

    def above(self, names):
        """`names` and all that refer to one of them, directly or not."""
        found, before = set(names), -1
        while len(found) != before and names:
            before = len(found)
            for name, kids in self.cache.db.execute(
                    'SELECT name, kids FROM blocks INDEXED BY parents '
                    'WHERE kids IS NOT NULL'):
                if name not in found and any(
                        kid[1] in found for kid in KID.iter_unpack(kids)):
                    found.add(name)
        return found

    def decide(self, doomed):
        """Delete what is damaged, or say that --fsck-prune must."""
        if self.opt.letter == 'p' and not self.prune(doomed):
            return False
        self.cache.rot(self.damage)
        if not self.cache.partial:
            self.cache.totals_make()
        self.finish()
        if self.damage:
            self.tell(doomed)
            raise UserError(
                '%s damaged, and %s with them; the next backup stores again '
                'what it finds of them, --fsck-prune deletes them' % (
                    plural(len(self.damage), 'block'),
                    plural(len(doomed), 'archive')))
        return True

    def finish(self):
        """What was found is what the cache directory holds from now on."""
        self.cache.db.execute('BEGIN IMMEDIATE')
        self.cache.save()
        self.cache.db.execute('COMMIT')
        self.cache.publish()
        if not self.damage and self.opt.key.can(ROLE_WRITE):
            parts_settle(self.remote, self.cache)
        self.cache.close()
        self.replace()

    def tell(self, doomed):
        """Which archives are not whole, and what is damaged, on stderr."""
        some = dict(list(self.damage.items())[:20])
        for why in damage_where(self.remote, some).values():
            warn(why)
        for archive, record in doomed:
            warn('Archive %s is damaged' % self.title(archive, record))

    def title(self, archive, record):
        """An archive's name, or its id where its record is lost."""
        title = self.titles.get(record)
        return '"%s"' % show(title) if title is not None else \
            'with the id %s' % archive.hex()

    # Pruning.

    def prune(self, doomed):
        """Delete `doomed`, and all blocks that no other archive needs; False
        if another host wrote meanwhile.  Durable on return.
        """
        cache = self.cache
        dead = release(cache, [record for _, record in doomed])[0]
        if not dead:
            return True
        release_check(cache, dead)
        if not set(self.damage) <= set(dead):
            raise inconsistent()
        gone = [cache.find(name) for name in dead]
        if not delete_decided(self.remote, cache, dead,
                              *self.prune_commit(doomed, dead)):
            return False
        self.opt.changed = True
        for archive, record in doomed:
            phase('  Deleted archive %s' % self.title(archive, record))
        phase('  Deleted %s (%s), %d of them damaged' % (
            plural(len(dead), 'block'),
            plural(sum(row[3] for row in gone), 'byte'), len(self.damage)))
        self.damage = {}
        self.catch_up((cache.n, cache.head))
        return True

    def prune_commit(self, doomed, dead):
        """(Commit, C_n) of it, with statistics of what is left."""
        cache, lost = self.cache, dict(doomed)
        archives = {archive: row for archive, row in
                    cache.archives().items() if archive not in lost}
        whole = [cache.total(row[0]) for row in archives.values()]
        gone = [cache.find(name) for name in dead]
        unique = cache.unique()
        return delete_commit(cache, doomed, dead, archives, (
            sum(row[0] for row in whole), sum(row[1] for row in whole),
            unique[0] - sum(row[2] or 0 for row in gone),
            unique[1] - sum(row[3] for row in gone), 0, 0, 0, 0,
            len(archives)))


def record_length(record):
    """Plain bytes a record counts with: see record_plain()."""
    return (len(RECORD_MAGIC) + RECORD_HEAD.size + 64
            + len(record.kids) * KID.size
            + 16 + U16.size + len(record.title) + U64.size)


def page_smalls(block):
    """(digest, packed extents) of the small files of a page."""
    for entry in page_entries(block):
        if entry.digest:
            yield entry.digest, small_pack(entry.digest, [
                (block.kids[kid].name, block.kids[kid].plain, offset, length)
                for kid, offset, length, _ in entry.extents])


def fsck_seen(opt, remote):
    """What this cache directory has seen must still be there."""
    try:
        seen = cache_seen(opt.cachedir, opt.key)
    except UserError:
        return                      # unreadable: it remembers nothing
    if seen and not opt.accept_rollback:
        history_follow(remote, seen, remote.head)


##############################################################################
# Options
#
# One table, from which come parsing, the configuration files and --help.  The
# command line is tar's: bundles, prefixes, an end at the first operand; see
# tarsnap(1).  Decides nothing but what was asked.
#
# A row of OPTIONS: name, letter, ARGUMENT, modes, in configuration files?,
# kind, help.
#
# name     `[no-]NAME` if --no-NAME exists, which takes no argument.
# modes    Letters of MODES, '' for all.  Elsewhere the option is accepted and
#          has no effect; or is refused, if `!` follows the letters; or, if `+`
#          follows, refused but as --no-NAME.  In a configuration file it is
#          ignored elsewhere in any case.
# kind     How it is kept, in the field of Settings that has its name:
#              FLAG            True; False as --no-NAME
#              COUNT           how often it was given
#              one(parse)      parse(ARGUMENT); None as --no-NAME.  Bounds may
#                              follow
#              many(parse)     a list of parse(ARGUMENT), one for each time
#              lists(read)     a list, longer by read(ARGUMENT, Settings) each
#                              time
#              choice(field)   its name, in a field that several rows share
#
# What may stand in a configuration file, or has a kind with once=True, may be
# given once on a command line (of a choice one row may; many() repeat);
# of anything else the last wins.
##############################################################################


class Usage(UserError):
    """The command line is wrong; the short usage follows."""


SIZE_TEXT = re.compile(r'([0-9]{1,19}) ?([kMGTPE]?)B?')
RATE_TEXT = re.compile(r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?')
INTEGER_TEXT = re.compile(r'\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)')


def size_parse(text):
    """Bytes in `12`, `5k`, `1 GB`: decimal powers; UserError otherwise."""
    found = SIZE_TEXT.fullmatch(text)
    if not found:
        raise UserError('Not a size: %s' % text)
    return int(found[1]) * 1000 ** (' kMGTPE'.index(found[2] or ' '))


def checkpoint_parse(text):
    """A size of at least 1 MB, or 0."""
    size = size_parse(text)
    if 0 < size < 1000000:
        raise UserError('%s is less than 1000000' % text)
    return size


def rate_parse(text):
    """A plain number, with a fraction and an exponent if wanted."""
    if not RATE_TEXT.fullmatch(text):
        raise UserError('Not a number: %s' % text)
    return float(text)


def integer_parse(text):
    """As strtol(3) with base 0: 0x is hexadecimal, 0 octal, and what follows
    the digits is ignored.
    """
    found = INTEGER_TEXT.match(text)
    if not found:
        raise UserError('Not an integer: %s' % text)
    sign, digits = found.groups()
    base = 16 if digits[:2] in ('0x', '0X') else 8 if digits[0] == '0' else 10
    return int(sign + digits, base)


def count_parse(text):
    """How many; 0 is none."""
    if not re.fullmatch('[0-9]{1,9}', text):
        raise UserError('Not a number: %s' % text)
    return int(text)


def creation_parse(text):
    """Seconds since 1970, but 0."""
    seconds = integer_parse(text)
    if not 0 < seconds < 1 << 63:
        raise UserError('Not a time: %s' % text)
    return seconds


def cd_parse(text):
    """-C, as it stands among the operands."""
    if not text:
        raise UserError('Empty name of a directory')
    return 'cd', os.fsencode(text)


def compression_parse(text):
    """A level of deflate: `none` or 1 to 9."""
    if text != 'none' and not re.fullmatch('[1-9]', text):
        raise UserError('Not none, or a level from 1 to 9: %s' % text)
    return 0 if text == 'none' else int(text)


def excludes_read(text, opt):
    """The patterns in a file."""
    return list_names(list_read(text), opt.null_input)


def rule_parse(text):
    """A rule of -s."""
    return Rule(path_text(os.fsencode(text)))


def ctime_parse(text):
    """What Newer takes, for a date; the next three are alike."""
    return 'ctime', date_parse(text)


def mtime_parse(text):
    return 'mtime', date_parse(text)


def ctime_of(text):
    return 'ctime', file_status(text).st_ctime_ns


def mtime_of(text):
    return 'mtime', file_status(text).st_mtime_ns


def file_status(path):
    """stat() of a file that an option names."""
    try:
        return os.stat(path)
    except (OSError, ValueError) as e:
        raise UserError('Cannot stat %s: %s' % (
            path, getattr(e, 'strerror', e))) from None


def command_parse(text):
    """PATH=COMMAND, as it stands among the operands."""
    path, _, command = text.partition('=')
    if not path.strip('/') or not command.strip() or path.endswith('/') \
            or '..' in path.split('/') \
            or len(os.fsencode(path)) > LONGEST_PATH:
        raise UserError('Not PATH=COMMAND: %s' % text)
    return 'command', os.fsencode(text)


def name_parse(text):
    """The name of an entry of any directory."""
    if not text or '/' in text:
        raise UserError('Not a name in a directory: %s' % text)
    return os.fsencode(text)


def snaptime_parse(text):
    """When a file was made, at the latest, in ns."""
    st = file_status(text)
    return min(st.st_mtime_ns, st.st_ctime_ns)


def share_parse(text):
    """The argument of --verify-share: a fraction, or bytes."""
    found = re.fullmatch(r'([0-9]{1,3}(?:\.[0-9]+)?)%', text)
    if found and 0 < float(found[1]) <= 100:
        return float(found[1]) / 100
    if found or not size_parse(text):
        raise UserError('Not a share from above 0%% to 100%%, or a size: %s'
                        % text)
    return size_parse(text)


def passphrase_parse(text):
    """METHOD:ARG as it is, if there is such a method."""
    ask_passphrase(text)
    return text


class Kind:
    """How an option is kept; made by the functions below."""

    __slots__ = ('how', 'parse', 'low', 'high', 'field', 'once')

    def __init__(self, how, parse=None, low=None, high=None, field='',
                 once=False):
        self.how = how              # 'flag', 'count', 'one', ...
        self.parse = parse          # text -> value, or UserError
        self.low = low              # bounds of the value, or None
        self.high = high
        self.field = field          # of Settings; '': as the option
        self.once = once            # may not be repeated

    def read(self, text):
        """The value of `text`; UserError says what is wrong with it."""
        value = self.parse(text)
        if self.low is not None and value < self.low:
            raise UserError('%s is less than %d' % (text, self.low))
        if self.high is not None and value > self.high:
            raise UserError('%s is more than %d' % (text, self.high))
        return value


FLAG = Kind('flag')
COUNT = Kind('count')


def one(parse, low=None, high=None, once=False):
    return Kind('one', parse, low, high, once=once)


def many(parse, field=''):
    return Kind('many', parse, field=field)


def lists(read, field=''):
    return Kind('lists', read, field=field)


def choice(field, once=False):
    return Kind('choice', field=field, once=once)


class Option:
    """One row: how it is written, where it is allowed, what it sets."""

    __slots__ = ('name', 'letter', 'arg', 'modes', 'strict', 'conf', 'kind',
                 'text', 'negative', 'field')

    def __init__(self, name, letter, arg, modes, conf, kind, text):
        self.name = name.replace('[no-]', '')   # long, without dashes
        self.negative = name != self.name       # --no-NAME exists
        self.letter = letter        # short letter or ''
        self.arg = arg              # name of its argument, '' for none
        self.modes = modes.rstrip('!+')         # '' is all of them
        self.strict = modes[len(self.modes):]   # refused elsewhere: ! or +
        self.conf = conf            # may stand in a configuration file
        self.kind = kind
        self.text = text            # a line for --help
        self.field = kind.field or self.name.replace('-', '_')

    def refused(self, letter, off):
        """True if a command line of that mode must not have it."""
        return bool(self.strict and letter not in self.modes
                    and not (off and self.strict == '+'))

    def set(self, opt, text, off):
        """Set the field of `opt`; `off` if it was written --no-NAME."""
        kind, field = self.kind, self.field
        if kind.how == 'count':
            setattr(opt, field, getattr(opt, field) + 1)
        elif kind.how == 'many':
            getattr(opt, field).append(kind.read(text))
        elif kind.how == 'lists':
            getattr(opt, field).extend(kind.parse(text, opt))
        elif kind.how == 'choice':
            setattr(opt, field, self.name)
        elif kind.how == 'flag':
            setattr(opt, field, not off)
        else:
            setattr(opt, field, None if off else kind.read(text))

    def default(self):
        return {'flag': False, 'count': 0, 'many': [],
                'lists': []}.get(self.kind.how)


# Mode letters: c d t x r as such, a --list-archives, s --print-stats,
# e --expire, f --fsck, i --initialize-cachedir, n --nuke, R --recover,
# h --print-head, p --fsck-prune, u --undelete, v --verify-config, D --diff,
# U --usage, V --verify, A --last-backup-age.
MODES = [
    # long name, letter, mode letter, text
    ('create', 'c', 'c', 'create an archive'),
    ('delete', 'd', 'd', 'delete archives'),
    ('undelete', '', 'u', 'bring back archives that were deleted'),
    ('expire', '', 'e', 'delete the archives that no --keep rule keeps'),
    ('list', 't', 't', 'list the contents of an archive'),
    ('extract', 'x', 'x', 'extract from an archive'),
    ('tar', 'r', 'r', 'write an archive to standard output as a tar stream'),
    ('list-archives', '', 'a', 'list the archives'),
    ('last-backup-age', '', 'A', 'how old the newest archive is, for monitors'
     ),
    ('print-stats', '', 's', 'print statistics (also with -c and -d)'),
    ('usage', '', 'U', 'what is used, what it costs, and what is left'),
    ('diff', '', 'D', 'compare two archives, or one and the disk'),
    ('verify', '', 'V', 'read all that archives consist of'),
    ('recover', '', 'R', 'settle what an interrupted run left'),
    ('fsck', '', 'f', 'rebuild the cache directory; look for damage'),
    ('fsck-prune', '', 'p', 'the same, and delete what is damaged'),
    ('initialize-cachedir', '', 'i', 'make an empty cache directory'),
    ('nuke', '', 'n', 'delete everything of this machine'),
    ('print-head', '', 'h', 'print the newest commit, N:HEX16 (also with '
     '-c and -d)'),
    ('verify-config', '', 'v', 'read the configuration and stop'),
]
MODE_WORDS = {row[2]: '-' + row[1] if row[1] and row[0] != 'print-stats'
              else '--' + row[0] for row in MODES}

OPTIONS = [Option(*row) for row in (
    # name, letter, argument, modes, config, kind, text
    ('file', 'f', 'NAME', 'cdtxrasuDV!', False, many(os.fsencode, 'names'),
     'name of the archive'),
    ('keyfile', '', 'FILE', '', True, one(str), 'key file to use'),
    ('cachedir', '', 'DIR', '', True, one(str), 'cache directory'),
    ('server', '', 'ADDRESS', '', True, one(str),
     'another address of the key\'s server; the pin stays'),
    ('configfile', '', 'FILE', '', False, many(str, 'configs'),
     'read this configuration file too'),
    ('archive-names', '', 'FILE', 'cdtxrasuDV!', False, one(str, once=True),
     'file with names of archives, one a line; - is standard input'),
    ('no-default-config', '', '', '', False, FLAG,
     'do not read the default configuration files'),
    ('cd', 'C', 'DIR', 'ctxD!', False, many(cd_parse, 'items'),
     'change to this directory'),
    ('verbose', 'v', '', '', False, COUNT, 'say more; may be repeated'),
    ('[no-]quiet', '', '', '', True, FLAG, 'no warnings about common things'),
    ('exclude', '', 'PATTERN', 'ctxD!', True, many(os.fsencode),
     'leave out what matches'),
    ('include', '', 'PATTERN', 'ctxD!', True, many(os.fsencode),
     'only what matches'),
    ('no-config-exclude', '', '', '', True, FLAG,
     'ignore exclude in configuration files read from now on'),
    ('no-config-include', '', '', '', True, FLAG,
     'ignore include in configuration files read from now on'),
    ('exclude-from', 'X', 'FILE', 'ctx', False, lists(excludes_read,
                                                      'exclude'),
     'leave out what matches a pattern in FILE'),
    ('files-from', 'T', 'FILE', 'ctx!', False, one(str),
     'take names from FILE, - is standard input'),
    ('null-input', '', '', 'ctx!', False, FLAG,
     'NUL ends each name of -T and -X'),
    ('newer', '', 'DATE', 'ctx!', False, many(ctime_parse, 'since'),
     'only what changed after DATE'),
    ('newer-mtime', '', 'DATE', 'ctx!', False, many(mtime_parse, 'since'),
     'only what was modified after DATE'),
    ('newer-than', '', 'FILE', 'ctx!', False, many(ctime_of, 'since'),
     'only what changed after FILE did'),
    ('newer-mtime-than', '', 'FILE', 'ctx!', False,
     many(mtime_of, 'since'), 'only what was modified after FILE was'),
    ('rename', 's', '/OLD/NEW/FLAGS', 'ctx', False,
     many(rule_parse, 'rules'), 'change names (basic regular expression)'),
    ('command', '', 'PATH=COMMAND', 'c!', False,
     many(command_parse, 'items'), 'store what COMMAND prints as PATH'),
    ('[no-]exclude-caches', '', '', 'c!', True, FLAG,
     'of directories with a CACHEDIR.TAG keep only that'),
    ('exclude-if-present', '', 'NAME', 'c!', True, many(name_parse),
     'of directories with an entry NAME keep only that'),
    ('[no-]nodump', '', '', 'c!', True, FLAG,
     'leave out what has the flag nodump'),
    ('norecurse', 'n', '', 'cD!', False, FLAG, 'do not descend'),
    ('interactive', 'w', '', 'cx', False, FLAG, 'ask about each entry'),
    ('check-links', 'l', '', 'c!', False, FLAG,
     'warn of hard links that are missing in the archive'),
    ('one-file-system', '', '', 'cD!', False, FLAG,
     'stay on the file system of each operand'),
    ('follow-operands', 'H', '', 'c!', False, choice('follow'),
     'follow symbolic links among the operands'),
    ('dereference', 'L', '', 'c!', False, choice('follow'),
     'follow all symbolic links'),
    ('[no-]insane-filesystems', '', '', 'cD', True, FLAG,
     'descend into proc, sysfs and the like'),
    ('[no-]noatime', '', '', 'c!', True, FLAG,
     'do not change access times by reading'),
    ('[no-]snaptime', '', 'FILE', 'c!', True, one(snaptime_parse),
     'the snapshot that is stored was made after FILE'),
    ('[no-]disk-pause', '', 'MS', 'c!', True, one(integer_parse, 0, 1000),
     'pause between entries, and each 64 KB'),
    ('[no-]store-atime', '', '', 'c!', True, FLAG, 'store access times'),
    ('absolute-paths', 'P', '', 'ctxD!', False, FLAG,
     'keep leading slashes; lift the guards of -x'),
    ('creationtime', '', 'UNIX', 'c', False, one(creation_parse),
     'creation time of the archive'),
    ('series', '', 'SERIES', 'ceA', False, one(os.fsencode),
     'series the archive belongs to; with --expire: only that one'),
    ('keep-last', '', 'N', 'e!', True, one(count_parse),
     'keep the last N archives'),
    ('keep-hourly', '', 'N', 'e!', True, one(count_parse),
     'keep the last archive of each of the last N hours that have one'),
    ('keep-daily', '', 'N', 'e!', True, one(count_parse), 'likewise of days'),
    ('keep-weekly', '', 'N', 'e!', True, one(count_parse),
     'likewise of weeks'),
    ('keep-monthly', '', 'N', 'e!', True, one(count_parse),
     'likewise of months'),
    ('keep-yearly', '', 'N', 'e!', True, one(count_parse),
     'likewise of years'),
    ('keep-within', '', 'SPAN', 'e!', True, one(span_parse),
     'keep what is at most SPAN (36h, 30d, 1y6m) older than the newest'),
    ('max-age', '', 'SPAN', 'A!', False, one(span_parse, once=True),
     'what is older is critical: exit status 2'),
    ('warn-age', '', 'SPAN', 'A!', False, one(span_parse, once=True),
     'what is older is a warning: exit status 1'),
    ('[no-]by-creation', '', '', 'e!', True, FLAG,
     'rules go by creation times, not by when the server received archives'),
    ('since-commit', '', 'N', 'u!', False, one(count_parse),
     'bring back all that commit N and later ones deleted'),
    ('dry-run', '', '', 'ceu!', False, choice('dry_run', once=True),
     'only pretend'),
    ('dry-run-metadata', '', '', 'c!', False, choice('dry_run', once=True),
     'only pretend, and read no file'),
    ('[no-]print-stats', '', '', 'cde', True, FLAG, 'print statistics'),
    ('[no-]humanize-numbers', '', '', '', True, FLAG, 'use kB, MB, ...'),
    ('csv-file', '', 'FILE', 'cdes', False, one(str, once=True),
     'statistics into FILE instead, comma-separated'),
    ('checkpoint-bytes', '', 'SIZE', 'c!', True, one(checkpoint_parse),
     'checkpoint each SIZE bytes of upload (0: never)'),
    ('[no-]maxbw', '', 'SIZE', 'c!', True, one(size_parse),
     'cut the archive short after SIZE bytes of upload'),
    ('maxbw-rate', '', 'BYTES', '', True, one(rate_parse, 8000, 1e9),
     'send and receive at most BYTES a second'),
    ('[no-]maxbw-rate-up', '', 'BYTES', '', True, one(rate_parse, 8000, 1e9),
     'send at most BYTES a second'),
    ('[no-]maxbw-rate-down', '', 'BYTES', '', True,
     one(rate_parse, 8000, 1e9), 'receive at most BYTES a second'),
    ('[no-]aggressive-networking', '', '', 'c+', True, FLAG,
     'has no effect'),
    ('lowmem', '', '', 'c!', True, choice('memory'),
     'use less memory, and perhaps more time'),
    ('verylowmem', '', '', 'c!', True, choice('memory'),
     'use still less memory'),
    ('normalmem', '', '', 'c!', True, choice('memory'),
     'use as much memory as usual'),
    ('[no-]progress-bytes', '', 'SIZE', 'cx!', True, one(size_parse, 1000),
     'say how far it is each SIZE bytes'),
    ('[no-]progress', '', '', 'cx', True, FLAG,
     'show how far it is, on a terminal'),
    ('[no-]totals', '', '', 'c!', True, FLAG, 'say how many bytes it has'),
    ('compression', '', 'LEVEL', 'c!', True, one(compression_parse),
     'none, or 1 (fast) to 9 (small)'),
    ('no-pad', '', '', 'c!', True, FLAG, 'do not hide the sizes of blocks'),
    ('verify-encode', '', '', 'c!', True, FLAG,
     'open every block again before it is sent'),
    ('strip-components', '', 'N', 'tx', False, one(integer_parse, 0),
     'drop leading elements of paths'),
    ('[no-]iso-dates', '', '', '', True, FLAG, 'dates as YYYY-MM-DD'),
    ('numeric-owner', '', '', '', False, FLAG, 'numbers, not names'),
    ('preserve-permissions', 'p', '', 'x', False, choice('permissions'),
     'restore modes, ACLs and attributes exactly (default for root)'),
    ('no-same-permissions', '', '', 'x', False, choice('permissions'),
     'restore modes under the umask, nothing else (default but for root)'),
    ('same-owner', '', '', 'x', False, choice('owner'),
     'restore owners (default for root)'),
    ('no-same-owner', 'o', '', 'x!', False, choice('owner'),
     'do not restore owners'),
    ('keep-old-files', 'k', '', 'x', False, FLAG, 'never overwrite'),
    ('keep-newer-files', '', '', 'x', False, FLAG,
     'do not replace newer files'),
    ('resume-extract', '', '', 'x', False, FLAG,
     'skip files that have the right size and time'),
    ('modification-time', 'm', '', 'x', False, FLAG,
     'do not restore modification times'),
    ('to-stdout', 'O', '', 'tx!', False, FLAG, 'write to standard output'),
    ('fast-read', 'q', '', 'tx!', False, FLAG,
     'stop when each operand was found'),
    ('sparse', 'S', '', 'x', False, FLAG, 'make runs of zeros holes'),
    ('unlink-first', 'U', '', 'x!', False, FLAG, 'unlink files first'),
    ('chroot', '', '', 'x', False, FLAG, 'chroot to the target first'),
    ('keep-going', '', '', '', False, FLAG, 'go on after a missing archive'),
    ('hashes', '', '', '', False, FLAG, 'list archive ids'),
    ('null-output', '', '', 'aestuxD!', False, FLAG, 'NUL ends each record'),
    ('json', '', '', 'acdestuxADUV', False, FLAG,
     'print JSON, one object to a line, diagnostics too'),
    ('verify-share', '', 'SHARE', 'V!', False, one(share_parse),
     'verify so much of the file data a run, as in 10% or 5G'),
    ('passphrase', '', 'METHOD:ARG', '', True, one(passphrase_parse),
     'where the passphrase comes from'),
    ('[no-]force-resources', '', '', '', True, FLAG,
     'open key files however costly that is'),
    ('[no-]retry-forever', '', '', '', True, FLAG, 'never stop reconnecting'),
    ('noisy-warnings', '', '', '', False, FLAG,
     'warn about every network problem'),
    ('expect-head', '', 'N:HEX16', 'txraADV!', False, one(str),
     'refuse a server whose state is older or another'),
    ('read-data', '', '', 'fp!', False, FLAG,
     'look at every chunk too, not only at the index'),
    ('accept-rollback', '', '', 'fptxraADV', False, FLAG,
     'believe a server that really lost commits'),
    ('dump-config', '', '', '', False, FLAG,
     'show the command line and the configuration files'),
    ('lock-wait', '', 'SECONDS', '', False, one(rate_parse, 0, once=True),
     'wait so long for the lock of the cache directory'),
    ('', 'W', 'NAME=ARG', '', False, one(str), 'the same as --NAME=ARG'),
    ('read-full-blocks', 'B', '', '', False, FLAG, 'has no effect'),
    ('debug-network-stats', '', '', '', False, FLAG, 'has no effect'),
    ('version', '', '', '', False, FLAG, 'print the version'),
    ('help', '', '', '', False, FLAG, 'print this'),
)]

ALIASES = {
    # letter or name, and what it stands for
    'h': 'dereference', 'insecure': 'absolute-paths', 'directory': 'cd',
    'no-recursion': 'norecurse', 'same-permissions': 'preserve-permissions',
    'unlink': 'unlink-first', 'I': 'files-from', 'null': 'null-input',
    'confirmation': 'interactive', 'newer-ctime': 'newer',
    'newer-ctime-than': 'newer-than',
    'passphrase-stdin': 'passphrase=dev:stdin-once',
}


class Settings:
    """What was asked, by name; every field stands here with its default."""

    def __init__(self):
        self.mode = None            # -c, --list-archives, ...
        self.letter = None          # of the mode
        self.argv = []              # the command line, bytes
        self.names = []             # of archives, bytes
        self.items = []             # ('cd' | 'path' | ..., bytes), in order
        self.stdin_by = None        # (option, as written) that reads stdin
        self.options_end = 0        # so many of them come before operands
        self.operands = []          # the paths among them
        self.directories = []       # the directories among them
        self.set_by = {}            # field -> 'command line' or FILE:LINE
        self.key = None             # Key, once loaded
        self.changed = False        # the server's state, by this run
        self.found = False          # the status tells of differences only
        self.patterns = None        # Patterns, if there are any
        for option in OPTIONS:
            setattr(self, option.field, option.default())
        self.print_head = False
        self.newer = self.rename = None     # Newer, Rename, if there are any
        self.checkpoint_bytes = CHECKPOINT_BYTES
        self.limits = (None, None)  # of what is sent and received
        self.passphrase = 'dev:tty-stdin'
        self.strip_components = self.lock_wait = 0

    def finish(self):
        """Fields under the names the sections use."""
        self.recurse = not self.norecurse
        self.follow_all = self.follow == 'dereference'
        self.follow_operands = self.follow == 'follow-operands'
        self.absolute = self.absolute_paths
        self.pad = not self.no_pad
        self.keep_old = self.keep_old_files
        self.keep_newer = self.keep_newer_files
        self.no_mtime = self.modification_time
        self.sparse_out = self.sparse
        if self.files_from:
            self.list_take(list_read(self.files_from))
        if self.rules:
            self.rename = Rename(self.rules)
        if self.since:
            self.newer = Newer(self.since)
        # None: as root does, and no other.
        self.own = self.owner and self.owner == 'same-owner'
        self.perms = self.permissions and \
            self.permissions == 'preserve-permissions'
        self.operands = [value for kind, value in self.items
                         if kind == 'path']
        self.directories = [value for kind, value in self.items
                            if kind == 'cd']
        self.limits = self.rate_limit('up'), self.rate_limit('down')
        if self.include or self.exclude:
            self.patterns = Patterns(self.exclude, self.include)

    def list_take(self, data):
        """The names of -T, before the operands."""
        if self.letter == 'c':          # taken apart as the walk comes to it
            list_names(data, self.null_input)
            names = [('list', data)]
        else:
            names = [('path', name)
                     for name in list_names(data, self.null_input)]
            if not names and len(self.items) == self.options_end:
                raise UserError('The list %s is empty: nothing is chosen'
                                % self.files_from)
        self.items[self.options_end:self.options_end] = names

    def rate_limit(self, direction):
        """The Limit of one direction, or None.  What was set first counts;
        of --maxbw-rate and the option of the direction beside it, the latter.
        """
        one = 'maxbw_rate_' + direction
        files = [(field, where.rpartition(':')[0]) for field, where
                 in self.set_by.items() if field in ('maxbw_rate', one)]
        if not files:
            return None
        field = one if (one, files[0][1]) in files else files[0][0]
        rate = getattr(self, field)
        return rate and Limit(rate)


COMMAND_LINE = 'command line'
STDIN_READERS = 'archive-names', 'exclude-from', 'files-from'   # if given -
SYSTEM_CONFIGS = ('/usr/local/etc/tarsnap.conf', '/etc/tarsnap.conf')


class Parser:
    """Reads a command line, then configuration files, into Settings.

    What may stand in a configuration file waits until the mode is known; all
    else acts at once, in the order it was written.
    """

    def __init__(self, argv):
        self.words = list(argv)
        self.opt = Settings()
        self.seen = []              # (Option, as written, --no-NAME?)
        self.delayed = []           # (Option, argument, --no-NAME?, written)
        self.lone_h = False         # -h was given: help, if there is no mode
        self.longs = {row[0]: row for row in MODES
                      if row[0] not in ('print-stats', 'tar')}
        self.letters = {row[1]: row for row in MODES if row[1]}
        self.directives = {}        # as longs, for configuration files
        for option in OPTIONS:
            names = [option.name] if option.name else []
            names += ['no-' + option.name] * option.negative
            self.longs.update(dict.fromkeys(names, option))
            if option.conf:
                self.directives.update(dict.fromkeys(names, option))
            if option.letter:
                self.letters[option.letter] = option
        for alias, name in ALIASES.items():
            table = self.letters if len(alias) == 1 else self.longs
            table[alias] = self.longs[name.partition('=')[0]]

    def parse(self):
        """The Settings of the whole line."""
        self.options()
        self.operands()
        self.mode_settle()
        for option, written, off in self.seen:
            if self.opt.letter and option.refused(self.opt.letter, off):
                raise UserError('Option %s is not permitted in mode %s'
                                % (written, self.opt.mode))
        for option, text, off, written in self.delayed:
            self.store(option, text, off, written, COMMAND_LINE)
        return self.opt

    def options(self):
        """Everything before the first operand."""
        if self.words and self.words[0][:1] not in ('-', ''):
            # Letters without a dash: their arguments follow in their order.
            for letter in self.words.pop(0):
                self.letter(letter, None)
        while self.words and self.words[0][:1] == '-' and self.words[0] != '-':
            word = self.words.pop(0)
            if word == '--':
                break
            if word.startswith('--'):
                self.long(word[2:])
            else:
                self.short(word[1:])

    def short(self, text):
        """A bundle of letters; the first that takes an argument has the
        rest, or the next word.
        """
        while text:
            letter, text = text[0], text[1:]
            row = self.letters.get(letter)
            if text and isinstance(row, Option) and row.arg:
                self.letter(letter, text)
                break
            self.letter(letter, None)

    def letter(self, letter, argument):
        """One letter, with the argument attached to it or None."""
        row = self.letters.get(letter)
        if row is None:
            raise Usage('Unknown option: -%s' % letter)
        if letter == 'h':
            self.lone_h = True
        if letter == 'W':
            self.long(self.argument('-W') if argument is None else argument)
        else:
            self.take(row, '-' + letter, argument)

    def long(self, text):
        """`name`, `name=argument`, or an unambiguous start of a name."""
        name, equals, argument = text.partition('=')
        if name not in self.longs:
            near = sorted(n for n in self.longs if n.startswith(name))
            if not near:
                raise Usage('Unknown option: --%s' % name)
            if any(self.longs[n] is not self.longs[near[0]] for n in near):
                raise Usage('Ambiguous option: --%s (%s)'
                            % (name, ', '.join('--' + n for n in near)))
            name = near[0]
        row = self.longs[name]
        off = isinstance(row, Option) and row.negative and \
            name == 'no-' + row.name
        whole = ALIASES.get(name, '')
        if equals and ('=' in whole or off or not isinstance(row, Option)
                       or not row.arg):
            raise Usage('Option --%s takes no argument' % name)
        if '=' in whole:
            argument, equals = whole.partition('=')[2], '='
        self.take(row, '--' + name, argument if equals else None, off)

    def argument(self, written):
        """The next word, which belongs to the option before it."""
        if not self.words:
            raise Usage('Option %s needs an argument' % written)
        return self.words.pop(0)

    def take(self, row, written, argument, off=False):
        """One option or mode: acted on, or queued."""
        if not isinstance(row, Option):
            self.mode_take(row, written)
            return
        if row.arg and not off and argument is None:
            argument = self.argument(written)
        self.seen.append((row, written, off))
        if row.conf and row.name != 'print-stats':
            self.delayed.append((row, argument, off, written))
        else:
            self.store(row, argument, off, written, COMMAND_LINE)

    def mode_take(self, row, written):
        if row[0] == 'print-head':
            self.opt.print_head = True
        elif self.opt.letter and self.opt.letter != row[2]:
            raise Usage('Only one of %s and %s may be given'
                        % (MODE_WORDS[self.opt.letter], written))
        else:
            self.opt.letter = row[2]

    def store(self, option, text, off, written, source):
        """Set one option; what is set already is an error on the command
        line, and stays in a configuration file.
        """
        opt, field = self.opt, option.field
        again = field in opt.set_by and option.kind.how != 'many'
        if again and source != COMMAND_LINE:
            return
        if option.name == 'print-stats':
            off = off and not opt.print_stats   # to ask for some wins
        elif again and (option.conf or option.kind.once):
            self.twice(option, written)
        opt.set_by[field] = source
        if option.name in STDIN_READERS:
            if opt.stdin_by and opt.stdin_by[0] == option.name and \
                    option.kind.how != 'many':
                opt.stdin_by = None     # the last one counts
            if text == '-':
                self.stdin_take(option.name, written + ' -')
        value_set(option, opt, text, off, written)

    def stdin_take(self, name, written):
        """Note that an option, '' for an operand, reads standard input;
        UserError if another does, as it would find nothing, or what is meant
        for that one.
        """
        by = self.opt.stdin_by
        if by and by != ('', written):      # of @- see merge_tar()
            raise UserError('%s and %s both read standard input'
                            % (by[1], written))
        self.opt.stdin_by = name, written

    def twice(self, option, written):
        other = next(row[1] for row in self.seen
                     if row[0].field == option.field)
        raise Usage('Option %s is given twice' % written if other == written
                    else 'Only one of %s and %s may be given'
                    % (other, written))

    def operands(self):
        """What follows the options; in mode c, -C may stand among it."""
        opt = self.opt
        opt.options_end = len(opt.items)
        while self.words:
            word = self.words.pop(0)
            if opt.letter == 'c' and word.startswith('-C'):
                self.short(word[1:])
                continue
            if opt.letter == 'c' and word.startswith('@@') and word != '@@':
                opt.items.append(('archive', os.fsencode(word[2:])))
                continue
            if opt.letter == 'c' and word[:1] == '@' and word[:2] != '@@' \
                    and word != '@':
                if word == '@-':
                    self.stdin_take('', word)
                opt.items.append(('tar', os.fsencode(word[1:])))
                continue
            if opt.letter == 'c' and word.startswith('--'):
                warn('"%s" after the first operand is taken as a path' % word)
            if not word:
                raise Usage('Empty operand')
            opt.items.append(('path', os.fsencode(word)))

    def mode_settle(self):
        """The mode, once everything was seen."""
        opt = self.opt
        if opt.letter is None:
            opt.letter = 's' if opt.print_stats else \
                'h' if opt.print_head else 'v' if opt.dump_config else None
        if opt.letter is None and self.lone_h:
            opt.help = True
        if opt.help or opt.version:
            return
        if opt.letter is None:
            raise Usage('Must specify one of -c, -d, -r, -t, -x, '
                        '--list-archives, --print-stats, --fsck, --nuke')
        opt.mode = MODE_WORDS[opt.letter]

    # Configuration files.

    def config_defaults(self):
        """Read the configuration files, the most important first."""
        if self.opt.dump_config:
            dump('Command line:', [show(b' '.join(self.opt.argv))])
        for path in self.opt.configs:
            self.config_read(path, True)
        if self.opt.no_default_config:
            return
        home = home_directory()
        xdg = os.environ.get('XDG_CONFIG_HOME') or os.path.join(home,
                                                                '.config')
        for path in (os.path.join(home, '.tarsnaprc'),
                     os.path.join(xdg, 'tarsnap', 'tarsnap.conf'),
                     *SYSTEM_CONFIGS):
            self.config_read(path, False)

    def config_read(self, path, must):
        """One file: a directive a line, the first setting wins."""
        try:
            with open(path, 'rb') as file:
                lines = lines_split(file.read())
        except OSError as e:
            if must or e.errno not in (errno.ENOENT, errno.ENOTDIR,
                                       errno.EACCES):
                raise UserError('Cannot read configuration file %s: %s'
                                % (path, e.strerror)) from None
            return
        lines = [os.fsdecode(line).lstrip(' \t') for line in lines]
        if self.opt.dump_config:
            dump('Configuration file %s:' % path, filter(None, lines))
        # These hold for the files after the one they stand in.
        skip = [name for name in ('exclude', 'include')
                if getattr(self.opt, 'no_config_' + name)]
        for number, line in enumerate(lines, 1):
            if line and not line.startswith('#'):
                self.directive(line, '%s:%d' % (path, number), skip)

    def directive(self, line, where, skip):
        """One line of a configuration file; `where` is FILE:LINE."""
        name, *rest = re.split('[ \t]+', line, maxsplit=1)
        argument = rest[0] if rest else ''
        option = self.directives.get(name)
        if option is None:
            raise UserError('%s: unknown directive: %s' % (where, name))
        off = name != option.name
        if option.arg and not off:
            if not argument:
                raise UserError('%s: %s needs an argument' % (where, name))
            if argument != argument.rstrip(' \t'):
                warn('%s: blanks at the end of the line are part of the '
                     'argument' % where)
        elif argument:
            raise UserError('%s: %s takes no argument' % (where, name))
        if '\0' in argument:
            raise UserError('%s: %s: a NUL in the argument' % (where, name))
        if argument.startswith('~'):
            argument = home_directory() + argument[1:]
        written = '%s: %s' % (where, name)
        if name in skip:
            return
        if not option.modes or self.opt.letter in option.modes:
            self.store(option, argument, off, written, where)
        elif self.opt.letter == 'v' and option.name != 'snaptime':
            # What another mode would say of it; snaptime's file may be made
            # for each run.
            value_set(option, Settings(), argument, off, written)


def value_set(option, opt, text, off, written):
    """Set an option, `written` so; UserError if its value is none."""
    try:
        option.set(opt, text, off)
    except UserError as e:
        raise UserError('%s: %s' % (written, e)) from None


def dump(title, lines):
    """For --dump-config: `lines` below their title."""
    note(title + '\n')
    for line in lines:
        note('  %s\n' % line)


def lines_split(text):
    """The lines of `text`, which end with \\n, \\r or \\r\\n."""
    return text.replace(b'\r\n', b'\n').replace(b'\r', b'\n').split(b'\n')


def home_directory():
    """Of the user this runs as; of the environment for one without entry."""
    import pwd
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return os.environ.get('HOME', '/')


USAGE = """\
usage: tarsnap -c [options] -f NAME [-C DIR] PATH ...
       tarsnap {-t | -x} [options] -f NAME [PATTERN ...]
       tarsnap {-d | -r} [options] -f NAME
       tarsnap --expire [--dry-run] --keep-RULE N ... [options]
       tarsnap --diff [options] -f NAME {-f NAME | [-C DIR] [PATTERN ...]}
       tarsnap --verify [options] [-f NAME ...]
       tarsnap {--list-archives | --print-stats | --usage} [options]
       tarsnap --last-backup-age [--max-age SPAN] [options]
       tarsnap {--fsck | --nuke} [options]
       tarsnap --help
"""


def help_print():
    """The long help, ending with the version, on standard output."""
    lines = [USAGE, 'Modes:']
    for name, letter, _, text in MODES:
        lines.append('  %-28s %s' % (
            ', '.join((['-' + letter] if letter else []) + ['--' + name])
            if name != 'tar' else '-r', text))
    lines.append('\nOptions:')
    for option in OPTIONS:
        words = (['-' + option.letter] if option.letter else []) + [
            '--' + ('[no-]' if option.negative else '') + option.name]
        lines.append('  %-28s %s' % (', '.join(words) + (
            ' ' + option.arg if option.arg else ''), option.text))
    lines.append('\ntarsnap %s' % VERSION)
    stdout_write('\n'.join(lines) + '\n')


##############################################################################
# Main
##############################################################################

NEEDS_CACHE = 'cdesfipuR'
NEEDS_STATE = 'dsR'
RUN = {'c': mode_create, 'd': mode_delete, 't': mode_read, 'x': mode_read,
       'r': mode_read, 'a': mode_read, 's': mode_print_stats,
       'e': mode_expire, 'u': mode_undelete,
       'f': mode_fsck, 'p': mode_fsck, 'i': mode_initialize, 'n': mode_nuke,
       'R': mode_recover, 'h': mode_print_head, 'D': mode_read,
       'U': mode_usage, 'V': mode_read, 'A': mode_last_backup_age}
FAILED = {'c': 'Error creating archive', 'd': 'Error deleting archive',
          'D': 'Error comparing archives', 'V': 'Error verifying archives',
          't': 'Error reading archive', 'x': 'Error extracting archive',
          'r': 'Error reading archive', 'a': 'Error listing archives',
          'U': 'Error reading usage',
          'A': 'The age of the last backup is not known',
          'e': 'Error expiring archives',
          'u': 'Error undeleting archives',
          's': 'Error generating archive statistics',
          'f': 'Error fscking archives', 'p': 'Error fscking archives',
          'R': 'Error recovering archive',
          'n': 'Error nuking archives',
          'i': 'Error initializing cache directory',
          'h': 'Error reading the newest commit'}


def names_read(opt):
    """Add the names in the file of --archive-names; empty lines are none."""
    path = opt.archive_names
    if path is None:
        return
    try:
        with open(0 if path == '-' else path, 'rb',
                  closefd=path != '-') as file:
            opt.names += filter(None, lines_split(file.read()))
    except OSError as e:
        raise UserError('Cannot read archive names from %s: %s' % (
            'standard input' if path == '-' else path, e.strerror)) from None


def settings_check(opt):
    """What must hold before the key is opened; in the contract's order."""
    letter = opt.letter
    names_check(opt)
    cachedir_check(opt)
    if opt.aggressive_networking and any(opt.limits):
        warn('--aggressive-networking is ignored, as the bandwidth is limited')
    if opt.strip_components and letter not in 'tx':
        raise UserError('Option --strip-components is not permitted in mode '
                        '%s' % opt.mode)
    check_modes(opt)
    if letter not in 'ctxD' and opt.items:
        raise UserError('Mode %s takes no operands: %s' % (
            opt.mode, show(opt.items[0][1])))
    if opt.csv_file and (letter == 's' or opt.print_stats):
        csv_check(opt.csv_file)
    if opt.dry_run == METADATA and opt.print_stats:
        raise UserError('--dry-run-metadata reads no file: it excludes '
                        '--print-stats')
    for field in ('null_output', 'csv_file', 'to_stdout', 'interactive'):
        if opt.json and getattr(opt, field) and (letter, field) != (
                't', 'to_stdout'):
            raise UserError('--json and --%s exclude each other'
                            % field.replace('_', '-'))


def names_check(opt):
    """As many archive names as the mode takes, of a length that may be."""
    letter = opt.letter
    if letter == 'c' and opt.dry_run and not opt.names:
        opt.names = [b'(dry-run)']
    if letter in 'cdtxrD' and not opt.names:
        raise UserError('Archive name must be specified')
    if letter == 'u' and (opt.names or not opt.dry_run) and \
            bool(opt.names) != (opt.since_commit is None):
        raise UserError('--undelete takes archive names or --since-commit')
    if letter in 'ctxr' and len(opt.names) > 1:
        raise UserError('Mode %s takes one archive name' % opt.mode)
    if letter == 'a' and opt.names and not opt.hashes:
        raise UserError('Mode --list-archives takes archive ids with --hashes'
                        ' only')
    if letter == 'c' and not 0 < len(opt.names[0]) <= 1023:
        raise UserError('Archive name must have 1 to 1023 bytes')
    if letter == 'c' and b'\0' in opt.names[0]:
        raise UserError('Archive name must not have a NUL in it')


def check_modes(opt):
    """What --diff and --verify want of their options."""
    if opt.letter == 'D':
        if len(opt.names) > 2:
            raise UserError('Mode --diff takes one or two archive names')
        if len(opt.names) == 2 and opt.directories:
            raise UserError('-C is for comparing an archive with the disk')
    if opt.letter == 'V' and opt.verify_share:
        if not opt.cachedir:
            raise UserError('--verify-share remembers where it was in the '
                            'cache directory: give --cachedir')
        if opt.names:
            raise UserError('--verify-share goes through all archives; leave '
                            'out -f')


def cachedir_check(opt):
    """A cache directory where one is needed, with something in it."""
    letter = opt.letter
    if letter in NEEDS_CACHE and not opt.cachedir \
            and not (letter in 'ceu' and opt.dry_run):
        raise UserError('Cache directory must be specified for %s (--cachedir'
                        ' or cachedir in tarsnap.conf)' % opt.mode)
    if letter in NEEDS_STATE and not cache_there(opt.cachedir):
        raise UserError('Error reading cache directory %s: it is empty; '
                        '--fsck fills it' % opt.cachedir)


def key_open(opt):
    """Load the key file of `opt`, asking for its passphrase if it has one;
    None if only a dry run is without one.
    """
    dry = opt.letter == 'c' and opt.dry_run
    if opt.dry_run == METADATA \
            and all(kind != 'archive' for kind, _ in opt.items):
        return None
    if not opt.keyfile and not dry:
        raise UserError('Key file must be specified (--keyfile or keyfile in '
                        'tarsnap.conf)')
    if dry and (not opt.keyfile or not os.path.exists(opt.keyfile)
                and opt.set_by['keyfile'] != COMMAND_LINE):
        keyless_check(opt)
        return None
    by = opt.stdin_by
    return key_load(opt.keyfile,
                    ask_passphrase(opt.passphrase, by and by[1]),
                    opt.force_resources)


def keyless_check(opt):
    """A dry run without a key: there is no use of a cache directory."""
    if opt.cachedir and opt.set_by['cachedir'] == COMMAND_LINE:
        raise UserError('Option --cachedir needs a key file, in a dry run '
                        'too (--keyfile)')
    if opt.cachedir:
        warn('Ignoring cachedir, as there is no key file')
        opt.cachedir = None
    if opt.print_stats:
        warn('Sizes are approximate, as there is no key file')


def run(argv):
    """Parse and do; the exit status.  Raises Error before the mode begins."""
    parser = Parser(argv[1:])
    try:
        opt = parser.parse()
        if not run_prepare(parser, opt, argv):
            return 0
    except Error as e:
        if parser.opt.letter == 'A':        # 1 would be a warning
            e.status = age_unknown(parser.opt, str(e))
        raise
    return mode_run(opt)


def run_prepare(parser, opt, argv):
    """All that comes before the mode; False if there is nothing to do."""
    if opt.json and sys.stderr is not None:
        sys.stderr = JsonErrors(sys.stderr)
    if opt.version:
        stdout_write('tarsnap %s\n' % VERSION)
        return False
    if opt.help:
        help_print()
        return False
    opt.argv = [os.fsencode(word) for word in argv]
    parser.config_defaults()
    opt.finish()
    names_read(opt)
    settings_check(opt)
    if opt.letter == 'v':
        return False
    opt.key = key_open(opt)
    if opt.cachedir:
        cachedir_make(opt.cachedir)
        opt.cachedir = os.path.abspath(opt.cachedir)    # whatever -C does
    return True


def mode_run(opt):
    """The mode itself; its status, once what ends a failure was said."""
    signals_set(opt)
    try:
        status = RUN[opt.letter](opt)
        sys.stdout.flush()
        if opt.letter == 'A':
            return status
    except BrokenPipeError:
        status = 2 if opt.changed else 1
    except Exception as e:
        warn(failure_text(e, opt))
        if opt.letter in FAILED:
            warn(FAILED[opt.letter])
        if opt.letter == 'A':
            return age_unknown(opt, failure_text(e, opt))
        status = 2 if opt.changed else 1
    if status and not opt.found:
        warn('Error exit delayed from previous errors.')
    if status == 2:
        warn('The server has changed what it stores nevertheless.')
    return status


def failure_text(error, opt):
    """The line that says what ended a mode; a bug is raised again."""
    if isinstance(error, Refused) and error.code == E_INTERNAL:
        return 'The server failed: %s' % error      # its disk, not ours
    if isinstance(error, Error):
        return str(error)
    if isinstance(error, OSError):
        return system_text(error)
    if type(error).__module__ == 'sqlite3':     # imported only where needed
        return cache_trouble(opt.cachedir, error)
    raise error


def system_text(error):
    """What the system refused, and of what if it says."""
    name = show(error.filename) + ': ' \
        if isinstance(error.filename, (str, bytes)) else ''
    return name + (error.strerror or str(error))


def program_name(path):
    """What messages begin with: the name this was started as."""
    name, suffix = os.path.splitext(os.path.basename(path))
    return name if suffix in ('.py', '.pyc') else name + suffix


def limits_set():
    """No core dumps of keys; threads that hand over quickly; a collector
    that is not always at it.
    """
    import resource
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError):
        pass
    sys.setswitchinterval(0.0005)
    gc.set_threshold(50000)         # few cycles are made; most is refcounted


def signals_set(opt):
    """What -c and -x answer does no harm in other modes.  Ctrl-C ends -c at
    once, which is safe at any moment: the interpreter would look at its next
    step, and that may never come while a pipe is silent.  Workers and ssh are
    waited for, which fails under a parent that left SIGCHLD ignored.
    """
    import signal
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if opt.letter == 'c' and \
            signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def output_end():
    """Drop what standard output and standard error could not take, or the
    interpreter would complain of it once more, and end with 120.
    """
    for fd, stream in (1, sys.stdout), (2, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def main(argv=None):
    """The command `tarsnap`; exits with its status."""
    if argv is None:
        argv = sys.argv
        warn.program = program_name(argv[0])
    streams_fill()
    for stream in (sys.stdout, sys.stderr):     # names as they came in,
        stream.reconfigure(encoding=sys.getfilesystemencoding(),
                           errors=sys.getfilesystemencodeerrors())
    try:
        limits_set()
        status = run(argv)
        if not status:
            sys.stdout.flush()
    except Usage as e:
        warn(str(e))
        note(USAGE)
        status = e.status
    except Error as e:
        warn(str(e))
        status = e.status
    except BrokenPipeError:
        status = 1
    except OSError as e:
        warn(system_text(e))
        status = 1
    except KeyboardInterrupt:
        import signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    output_end()
    sys.exit(status)


if __name__ == '__main__':
    main()
