#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap: online backups for the truly paranoid; this is the client.

One file and a key file are all a machine needs to back itself up and to be
restored.  Python >= 3.9 and the `cryptography` package; nothing else.

The way of the data, going out:

    walk -> entries -> pages of 512 -> as they were last time? reuse the page
         -> read, cut into chunks   (boundaries from a secret PRF)
         -> name, look up, deflate, pad, seal            (a pool of threads)
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
    history               what the server says happened, checked
    cache directory       what is stored already, and how often it is used
    transaction           puts, checkpoints, the commit and its conflicts
    walk                  a tree in the order of its names
    create                files into chunks; pages, their reuse, the archive
    fetch                 blocks in order, many in flight
    extract               files made again, never outside the target
    list                  -t, -r, --list-archives
    modes that write      create, delete, fsck, nuke; statistics
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


class UserError(Error):
    """The command, the configuration or a key is wrong; exit 1."""


class RemoteError(Error):
    """The network or the server is in the way; trying again may help."""


class CorruptError(Error):
    """Stored data or an answer is not what was stored; never retried."""


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


def warn(text):
    """One line on stderr in the program's name; never fails."""
    try:
        sys.stderr.write('tarsnap: %s\n' % text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
    except UnicodeEncodeError:
        sys.stderr.write('tarsnap: %s\n' % ascii(text)[1:-1])


def plural(count, noun):
    return '%d %s%s' % (count, noun, '' if count == 1 else 's')


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


##############################################################################
# Wire
#
# Frames, their types, error codes and ceilings: tarsnap-protocol(7).  The
# server has its own copy of these numbers; a test holds the two equal.
##############################################################################

PROTOCOL = 1

# Client to server.
HELLO, REGISTER1, REGISTER2, AUTH, STAT, CHANGES, LIST, GET, HAS = range(1, 10)
BEGIN, PUT, WITHDRAW, DELETE, CHECKPOINT, COMMIT, ABORT, NUKE = range(10, 18)

# Server to client.
(STATEMENT, OK, ERROR, CHALLENGE, REGISTERED, AUTHOK, STATUS, COMMIT_OBJECT,
 ADDED, REMOVED, ARCHIVES, BLOCK, BITMAP, BEGUN, RECEIVED, COMMITTED,
 BUSY) = range(128, 145)

(E_BAD, E_ROLE, E_CONFLICT, E_EXISTS, E_NOBLOCK, E_FUNDS, E_QUOTA, E_READONLY,
 E_BUSY, E_EXPIRED, E_RESYNC, E_LOGIN, E_NOMACHINE, E_MISMATCH, E_NOARCHIVE,
 E_INTERNAL) = range(1, 17)

ROLE_READ, ROLE_WRITE, ROLE_DELETE, ROLE_NUKE = 1, 2, 3, 4
ROLE_NAME = {1: 'read', 2: 'write', 3: 'delete', 4: 'nuke'}

KIND_WRITE, KIND_DELETE, KIND_NUKE, KIND_ABORT = 1, 2, 3, 4
KIND_ROLE = {1: ROLE_WRITE, 2: ROLE_DELETE, 3: ROLE_NUKE, 4: ROLE_WRITE}

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

    __slots__ = ('key', 'fresh', 'lock', 'pad', 'level')

    def __init__(self, key, level=2, pad=True):
        self.key = key                  # Key
        self.pad = pad                  # zeros up to a PADME length
        self.level = level              # deflate level
        self.lock = threading.Lock()    # guards fresh
        self.fresh = None               # (process, epk, recipient -> S)

    def ephemeral(self):
        """(epk, recipient -> S): made at the start and in a forked child."""
        fresh = self.fresh
        if fresh and fresh[0] == os.getpid():
            return fresh[1:]
        from cryptography.hazmat.primitives.asymmetric import x25519
        with self.lock:
            if self.fresh and self.fresh[0] == os.getpid():
                return self.fresh[1:]       # another thread made it
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
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        epk, secrets = self.ephemeral()
        level = self.level if level is None else level
        out = [BLOCK_HEAD.pack(SUITE, cls, len(parts), epk)]
        for number, data in enumerate(parts):
            recipient = RECIPIENTS[cls][number]
            plain = frame_plain(data, level, self.pad)
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
            plain = AESGCM(key).decrypt(nonce, text, block_aad(
                cls, number, name, machine))
        except InvalidTag:
            raise CorruptError('%s: not what was stored under this name (its '
                               'seal is broken)' % what) from None
        out.append(unframe_plain(plain, CEILING['part'], what))
    reader.end()
    return out


def raw_public(private):
    """The 32 raw bytes of the public half of an X25519 or Ed25519 key."""
    from cryptography.hazmat.primitives import serialization as ser
    return private.public_key().public_bytes(ser.Encoding.Raw,
                                             ser.PublicFormat.Raw)


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

    __slots__ = ('data', 'refs')

    def __init__(self, key):
        self.data = key.k_data and hmac.new(key.k_data, b'', 'sha256')
        self.refs = key.k_refs and hmac.new(key.k_refs, b'', 'sha256')

    def _mac(self, base, prefix, data):
        mac = base.copy()
        mac.update(prefix)
        mac.update(data)
        return mac.digest()

    def chunk(self, data):
        return self._mac(self.data, b'c', data)

    def rows(self, data):
        return self._mac(self.data, b'r', data)

    def content(self, data):
        """16 bytes that tell equal small files."""
        return self._mac(self.data, b'd', data)[:16]

    def index(self, refs):
        return self._mac(self.refs, b'p', refs)

    def record(self, refs):
        return self._mac(self.refs, b'a', refs)

    def archive(self, name):
        """Archive id of the archive called `name` (bytes)."""
        return self._mac(self.refs, b'n', name)

    def series(self, series):
        return self._mac(self.refs, b's', series)[:16]


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


def ask_passphrase(method):
    """A function path -> passphrase (bytes) for `--passphrase METHOD:ARG`."""
    kind, _, arg = method.partition(':')
    if kind == 'dev' and arg in ('tty-stdin', 'tty-once', 'stdin-once'):
        return lambda path: passphrase_dev(arg, PROMPT % path)
    if kind == 'env' and arg:
        return lambda path: passphrase_env(arg)
    if kind == 'file' and arg:
        return lambda path: passphrase_file(arg)
    raise UserError('Invalid passphrase method: %s' % method)


def passphrase_dev(source, prompt):
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
    if os.isatty(0):
        return passphrase_tty(os.dup(0), prompt)
    return line_read(0)


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
            text = file.read(2049)
    except OSError as e:
        raise UserError('Cannot read passphrase file %s: %s'
                        % (path, e.strerror)) from None
    line, newline, rest = text.partition(b'\n')
    if rest or len(line) > 2048:
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
    flags = 0
    tail = [U8.pack(len(entry.uname)), entry.uname,
            U8.pack(len(entry.gname)), entry.gname]
    if entry.kind == SYMLINK:
        tail += (U16.pack(len(entry.target)), entry.target)
    elif entry.kind in (CHARDEV, BLOCKDEV):
        tail.append(DEVICE.pack(*entry.device))
    if entry.link:
        flags |= HAS_LINK
        tail.append(LINK.pack(*entry.link))
    if entry.atime is not None:
        flags |= HAS_ATIME
        tail.append(ATIME.pack(*divmod(entry.atime, BILLION)))
    if entry.xattrs:
        flags |= HAS_XATTRS
        tail.append(xattrs_pack(entry.xattrs))
    if entry.digest:
        flags |= HAS_DIGEST
        tail.append(entry.digest)
    if entry.lists:
        flags |= IN_LISTS
        tail.append(struct.pack('>BH%dI' % len(entry.lists), entry.level,
                                len(entry.lists), *entry.lists))
    elif entry.kind == FILE:
        tail.append(U16.pack(len(entry.extents)))
        tail += [EXTENT.pack(*extent) for extent in entry.extents]
    seconds, nanos = divmod(entry.mtime, BILLION)
    row = b''.join((ROW_HEAD.pack(
        entry.kind, flags, entry.mode, entry.uid, entry.gid, seconds, nanos,
        entry.size, len(entry.path)), entry.path, *tail))
    return U32.pack(len(row)) + row


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
        raise CorruptError('%s: unknown version' % reader.what)
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
    digest = hashlib.sha256()
    for archive in sorted(archives):
        link = archives[archive]
        digest.update(archive + link[0] + U8.pack(link[2]))
    return digest.digest()


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
WEAK = 16                   # first 16 bits below this: 12 of them are zero


class Cutter:
    """Cuts one stream.  Mean chunk about 80 KiB.

    Where no window ends a chunk up to CHUNK_MAX, it ends after the last of
    the smallest windows of those with 12 zero bits; where there is none, at
    CHUNK_MAX.  (One byte inserted into 32 MB of records of one size re-sends
    0.3 MB with that rule, 3.3 MB without.)
    """

    __slots__ = ('aes', 'out', 'tail', 'seen', 'hits')

    def __init__(self, key):
        from cryptography.hazmat.primitives.ciphers import Cipher, \
            algorithms, modes
        self.aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        self.out = bytearray(SCAN + WINDOW)
        self.tail = b''         # bytes of the stream since the last cut
        self.seen = 0           # of those, how many are scanned
        self.hits = []          # (end, first 16 bits) in tail, rising

    def feed(self, data):
        """Take more of the stream; the chunks (bytes) that end in it."""
        buf = self.tail + data if self.tail else data
        hits = self.hits + self.scan(buf, max(0, self.seen - WINDOW + 1))
        out, start, first = [], 0, 0
        while True:
            end, first = self.end(hits, first, start, len(buf))
            if end is None:
                break
            out.append(buf[start:end])
            start = end
        self.tail = buf[start:]
        self.seen = len(self.tail)
        self.hits = [(end - start, value) for end, value in hits[first:]]
        return out

    def finish(self):
        """End the stream: its last chunk, or b'' if nothing is left."""
        tail, self.tail, self.seen, self.hits = self.tail, b'', 0, []
        return tail

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

    def scan(self, buf, start):
        """[(end, value)] of the windows of `buf` from `start`, value < WEAK.

        Sixteen calls, one for each alignment, hold every window once.
        """
        hits = []
        view, out = memoryview(buf), self.out
        for base in range(start, len(buf) - WINDOW + 1, SCAN):
            piece = view[base:base + SCAN + WINDOW - 1]
            for shift in range(min(WINDOW, len(piece) - WINDOW + 1)):
                length = (len(piece) - shift) & -WINDOW
                self.aes.update_into(piece[shift:shift + length], out)
                column = bytes(out[0:length:WINDOW])
                at = column.find(0)
                while at >= 0:
                    value = out[WINDOW * at + 1]
                    if value < WEAK:
                        hits.append((base + shift + WINDOW * at + WINDOW,
                                     value))
                    at = column.find(0, at + 1)
        hits.sort()
        return hits


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

# Seconds to wait before each try to connect again.
WAITS = (0, 0, 1, 2, 4, 8, 15, 30, 60, 90, 90)
FIRST_TRIES = 3             # where nothing was ever reached


class ChannelLost(RemoteError):
    """The connection broke; what was in flight may or may not have arrived."""


class TlsLink:
    """Frames over TLS 1.3 to HOST:PORT."""

    transport = TRANSPORT_TLS

    def __init__(self, server):
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
        try:
            raw = socket.create_connection(self.address, CONNECT_SECONDS)
        except socket.gaierror as e:
            raise ChannelLost('Error looking up %s: %s'
                              % (self.address[0], e.strerror)) from None
        except OSError as e:
            raise ChannelLost('Cannot connect to %s: %s'
                              % (where, e.strerror or e)) from None
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

    def fileno(self):
        return self.sock.fileno()

    write_fileno = fileno

    def read(self):
        """What has come: bytes, None for nothing yet, b'' for the end."""
        import ssl
        try:
            return self.sock.recv(READ_SIZE)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError,
                BlockingIOError):
            return None

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
        ssh = shlex.split(os.environ.get('TARSNAP_SSH', 'ssh'))
        return ssh + ['-T'] + (['-p', port] if port else []) + [host, far]

    def open(self):
        """Start ssh; it asks for what it wants on the terminal."""
        import subprocess
        try:
            self.child = subprocess.Popen(
                self.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                bufsize=0, close_fds=True)
        except OSError as e:
            raise UserError('Cannot run ssh: %s' % e.strerror) from None
        os.set_blocking(self.child.stdin.fileno(), False)
        os.set_blocking(self.child.stdout.fileno(), False)

    def fileno(self):
        return self.child.stdout.fileno()

    def write_fileno(self):
        return self.child.stdin.fileno()

    def read(self):
        try:
            return os.read(self.child.stdout.fileno(), READ_SIZE)
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


def link_make(server):
    """The link for a server's address."""
    if server.startswith('ssh://'):
        return PipeLink(server)
    if '/' in server or os.path.isdir(server):
        return LocalLink(server)
    return TlsLink(server)


class Channel:
    """Frames out, answers in, over one link; used by any thread.

    Every waiting call raises ChannelLost once the link is gone.
    """

    def __init__(self, server):
        self.server = server
        self.link = link_make(server)
        self.changed = threading.Condition()    # guards all below
        self.out = collections.deque()          # frames not yet sent
        self.answers = {}                       # request id -> deque
        self.statement = None                   # body of the first frame
        self.unread = set()                     # ids no longer listened to
        self.received = 0                       # count in the last RECEIVED
        self.failed = None                      # why the link is gone
        self.opened = False                     # something answers
        self.closing = False
        self.waiting = 0                        # threads waiting for answers
        self.heard = time.monotonic()           # when something last came
        self.last = 0                           # last request id
        self.round_trips = 0                    # waits for an answer
        self.bytes_in = self.bytes_out = 0
        self.wake_r, self.wake_w = os.pipe()
        os.set_blocking(self.wake_r, False)
        os.set_blocking(self.wake_w, False)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

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
            self.enqueue(kind, rid, body)
        return rid

    def enqueue(self, kind, rid, body):
        """Queue a frame; the thread is woken if it may be asleep."""
        self.out.append((kind, rid, body))
        if len(self.out) == 1:
            self.wake()

    def push(self, kind, body):
        """Queue a request that has no answer."""
        with self.changed:
            if self.failed:
                raise self.failed
            self.last += 1
            self.enqueue(kind, self.last, body)

    def next(self, rid):
        """The next answer to `rid` as (type, body)."""
        with self.changed:
            queue = self.answers[rid]
            if not queue:
                self.round_trips += 1
            while not queue:
                self.wait()
            return queue.popleft()

    def wait(self):
        """Until something came, with `changed` held; raises ChannelLost."""
        if self.failed:
            raise self.failed
        if not self.waiting:
            self.heard = time.monotonic()
        self.waiting += 1
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
            self.forget(rid)
            if not over:
                self.unread.add(rid)

    def call(self, kind, *body):
        """Ask, and return the one answer as (type, body)."""
        rid = self.post(kind, *body)
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
            self.answers.pop(rid, None)

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
                frames = list(self.out)
                self.out.clear()
                closing = self.closing
            for kind, rid, body in frames:
                for answer in local.receive(kind, rid, body):
                    self.deliver(*answer)
            if frames:
                continue
            for answer in local.idle():
                self.deliver(*answer)
            if closing:
                return
            select.select([self.wake_r], [], [])
            os.read(self.wake_r, 4096)

    def run_socket(self):
        """Move bytes both ways until close() and all is sent."""
        import selectors
        link, buf = self.link, bytearray()
        sending, done = memoryview(b''), False
        with selectors.DefaultSelector() as selector:
            selector.register(link.fileno(), selectors.EVENT_READ)
            selector.register(self.wake_r, selectors.EVENT_READ)
            while True:
                if not sending:
                    sending, done = self.gather()
                if done:
                    return
                if sending:
                    sending = sending[link.write(sending):]
                self.watch(selector, bool(sending))
                if not link.pending():
                    self.listen(selector)
                data = link.read()
                if data == b'':
                    raise ChannelLost('Connection closed by %s' % self.server)
                if data:
                    self.heard = time.monotonic()
                    self.bytes_in += len(data)
                    buf += data
                    self.parse(buf)

    def watch(self, selector, writing):
        """Wait for room to write too, or no longer."""
        import selectors
        fd, reader = self.link.write_fileno(), self.link.fileno()
        read = selectors.EVENT_READ if fd == reader else 0
        events = read | (selectors.EVENT_WRITE if writing else 0)
        known = selector.get_map().get(fd)
        if known is None:
            if events:
                selector.register(fd, events)
        elif not events:
            selector.unregister(fd)
        elif known.events != events:
            selector.modify(fd, events)

    def listen(self, selector):
        """Sleep until something can be done."""
        ready = selector.select(SILENCE / 4)
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
            while self.out and size < MIB:
                kind, rid, body = self.out.popleft()
                pieces += (FRAME.pack(len(body), kind, rid), body)
                size += len(body) + FRAME.size
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
            if kind == RECEIVED:
                self.received = Reader(body, 'RECEIVED').u64()
            elif rid in self.answers:
                self.answers[rid].append((kind, body))
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


def channel_auth(channel, statement, key, role):
    """Prove `role` of `key`; (head n, H_n, archives, read-only)."""
    nonce = os.urandom(32)
    signed = b'tarsnap-auth-1\x00' + struct.pack(
        '>HB16s32sQB', PROTOCOL, channel.link.transport, key.store,
        channel.link.cert_hash, key.machine, role) + statement.nonce + nonce
    kind, body = channel.call(
        AUTH, struct.pack('>HQB', PROTOCOL, key.machine, role), nonce,
        sign(key.sign_privs[role], signed))
    reader = Reader(body, 'answer to AUTH')
    head = (reader.u64(), reader.take(32))
    return head, reader.u64(), reader.u8() & 1


class Remote:
    """The server of a key file, reached again whenever it is lost."""

    def __init__(self, key, roles, server=None, forever=False, noisy=False):
        self.key = key
        self.roles = roles              # ROLE_* to prove, in order
        self.server = server or key.server
        self.forever = forever          # never give up
        self.noisy = noisy              # warn at every hitch
        self.reached = False            # at least once
        self.channel = None
        self.head = (0, b'')            # (n, H_n), the newest seen
        self.archives = 0               # live ones then
        self.read_only = False

    def connect(self):
        """An authenticated Channel: the one there is, or a new one.

        Waits longer and longer between tries; RemoteError when it gives up.
        """
        if self.channel and not self.channel.failed:
            return self.channel
        attempt, warned = 0, False
        while True:
            try:
                channel = self.connect_once()
            except (ChannelLost, Refused) as e:
                if isinstance(e, Refused) and e.code != E_BUSY:
                    raise
                attempt += 1
                most = len(WAITS) if self.reached else FIRST_TRIES
                if attempt >= most and not self.forever:
                    raise RemoteError('Too many network failures: %s'
                                      % e) from None
                wait = WAITS[min(attempt, len(WAITS) - 1)]
                if self.noisy or (wait >= 30 and not warned):
                    warn('%s; trying again' % e)
                    warned = True
                time.sleep(wait)
                continue
            if warned:
                warn('Connection to %s is back' % self.server)
            self.reached = True
            return channel

    def connect_once(self):
        """One try: who the server is, then who we are; RemoteError."""
        self.close()
        channel = Channel(self.server)
        try:
            statement = channel_check(channel, self.key)
            for role in self.roles:
                self.head, self.archives, self.read_only = channel_auth(
                    channel, statement, self.key, role)
        except BaseException:
            channel.close()
            raise
        self.channel = channel
        return channel

    def saw(self, n, head):
        """Commit `n` stands: no server of ours is older from now on."""
        if n > self.head[0]:
            self.head = (n, head)

    def ask(self, kind, *body):
        """All answers to a request that may be repeated, up to its OK."""
        for _ in WAITS:
            channel = self.connect()
            try:
                return list(channel.stream(channel.post(kind, *body)))
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
    needs one match if there is any include or operand.
    """

    def __init__(self, exclude=(), include=(), operands=()):
        self.any = bool(exclude or include or operands)
        self.excludes = bool(exclude)
        self.includes = bool(include or operands)
        self.names, self.exclude = exclude_compile(exclude)
        self.operands = list(operands)
        self.plain = {}         # literal path -> numbers of its patterns
        self.wild = []          # (expression, number), those with wildcards
        self.missed = set(range(len(operands)))     # operands not matched
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
            if expression.match(path):
                hit = True
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
ESCAPES = {'\a': '\\a', '\b': '\\b', '\f': '\\f', '\n': '\\n', '\r': '\\r',
           '\t': '\\t', '\v': '\\v', '\\': '\\\\'}


def path_escape(path):
    """`path` (bytes) as bytes that neither end a line nor drive a terminal."""
    if not UNSAFE.search(path):
        return path
    text = path.decode('utf-8', 'surrogateescape')
    return CONTROL.sub(escape_one, text).encode('utf-8')


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
            change = Change(body[8:], U64.unpack_from(body)[0], remote.key)
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
    Needs the read or the delete role.
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
        raise CorruptError(
            'The server\'s list of archives is not the one signed in commit '
            '%d: it hides, adds or swaps archives' % head[0])
    if head[0] != remote.head[0]:
        history_follow(remote, *sorted((head, remote.head)))
    if opt.cachedir:
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
CREATE TABLE IF NOT EXISTS archives(
    id BLOB PRIMARY KEY, record BLOB, lineage BLOB, state INTEGER,
    time INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS small(
    digest BLOB PRIMARY KEY, extents BLOB) WITHOUT ROWID;
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

CANDIDATES = 4              # memo pages kept for one first member
PROFILE_RUNS = 20           # runs after which a profile not used is dropped
SMALL_EXTENT = struct.Struct('>32sIII')     # chunk, its length, offset, length
USE = struct.Struct('>32sI')                # chunk, live bytes


def database(path, script, synchronous):
    """Open the SQLite file `path`, made and brought up to `script`.

    Rollback journal: nothing lies beside the file, and it works on network
    homes.  Used from several threads, always under a lock of the caller.
    """
    import sqlite3
    db = sqlite3.connect(path, timeout=300, isolation_level=None,
                         check_same_thread=False)
    db.execute('PRAGMA synchronous=%s' % synchronous)
    os.chmod(path, 0o600)
    db.execute('PRAGMA cache_size=-8192')
    db.executescript(script)
    return db


def cachedir_make(path):
    """Make the cache directory and its parents, 0700 each, saying so."""
    missing = []
    where = os.path.abspath(path)
    while not os.path.isdir(where):
        missing.append(where)
        where = os.path.dirname(where)
    for where in reversed(missing):
        try:
            os.mkdir(where, 0o700)
        except OSError as e:
            raise UserError('Cannot create cache directory %s: %s'
                            % (where, e.strerror)) from None
        sys.stderr.write('Directory %s created for "--cachedir %s"\n'
                         % (where, path))
    mode = os.stat(path).st_mode
    if stat.S_IMODE(mode) & 0o077:
        try:
            os.chmod(path, 0o700)
        except OSError:
            pass


def cachedir_lock(path):
    """An exclusive lock on the cache directory, held while it is open.

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
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise UserError('Transaction already in progress (cache directory %s '
                        'is locked)' % path) from None
    return fd


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


def cache_damaged(path, error):
    """What is said of a `directory` that cannot be read."""
    return UserError('Error reading cache directory %s: %s; run --fsck'
                     % (path, error))


def cache_seen(path, key):
    """The head (n, H_n) a cache directory remembers, or None.  No lock."""
    import sqlite3
    where = os.path.join(path, 'directory')
    if not os.path.isfile(where):
        return None
    try:
        db = sqlite3.connect('file:%s?mode=ro' % os.path.abspath(where),
                             uri=True, timeout=300)
        try:
            meta = dict(db.execute('SELECT key, value FROM meta'))
        finally:
            db.close()
        if meta and meta_check(meta) != meta.get('check'):
            raise ValueError('checksum differs')
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as e:
        raise cache_damaged(path, e) from None
    if meta.get('machine') != U64.pack(key.machine) or 'head' not in meta:
        return None
    return U64.unpack(meta['n'])[0], meta['head']


def inconsistent():
    """What a cache says that lacks a block, or what is below it."""
    return UserError('Directory is not consistent with archive: Run --fsck')


class Cache:
    """An open cache directory.

    Everything here is about committed state; `pending` belongs to the
    Transaction.  `lock` guards the database between threads.
    """

    def __init__(self, path, key, lock=True):
        """Open `path` for the machine of `key`; UserError if it is another's
        or cannot be read.
        """
        import sqlite3
        self.path = path
        self.key = key
        self.lock = threading.RLock()
        self.lockf = cachedir_lock(path) if lock else None
        self.db = None
        try:
            # EXTRA: also the end of the journal is on disk, without which
            # a power cut takes the commit back.
            self.db = database(os.path.join(path, 'directory'),
                               SQL_DIRECTORY, 'EXTRA')
            self.load()
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as e:
            self.close()
            raise cache_damaged(path, e) from None
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
            self.partial = False
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

    def save(self):
        """Write the meta row, inside the caller's SQLite transaction."""
        rows = {'machine': U64.pack(self.key.machine), 'n': U64.pack(self.n),
                'head': self.head, 'totals': TOTALS.pack(*self.totals),
                'partial': b'1' if self.partial else b'',
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
        with self.lock:
            return self.db.execute(
                'SELECT cls, count, plain, stored, tplain, tstored '
                'FROM blocks WHERE name = ?', (name,)).fetchone()

    def kids(self, name):
        """The Kids of an index block or record; None if not known."""
        with self.lock:
            row = self.db.execute('SELECT kids FROM blocks WHERE name = ?',
                                  (name,)).fetchone()
        if row is None or row[0] is None:
            return None
        return [Kid(*fields) for fields in KID.iter_unpack(row[0])]

    def small(self, digest):
        """[(chunk, its length, offset, length)] of a small file, or None."""
        if self.blank:
            return None
        with self.lock:
            row = self.db.execute('SELECT extents FROM small '
                                  'WHERE digest = ?', (digest,)).fetchone()
        return row and small_unpack(digest, row[0])

    def archives(self):
        """Live archives: id -> (record, lineage, state, receive time)."""
        with self.lock:
            return {row[0]: row[1:] for row in self.db.execute(
                'SELECT id, record, lineage, state, time FROM archives')}

    def empty(self):
        """True if no block is known."""
        with self.lock:
            return self.db.execute('SELECT 1 FROM blocks LIMIT 1'
                                   ).fetchone() is None

    # Catching up with what others committed.

    def catch_up(self, changes):
        """Apply verified Changes made elsewhere; durable on return.

        Blocks put by others are known by name and stored length only, until
        read_missing() of the transaction reads what they refer to.  True if
        anything changed.
        """
        moved = False
        archives = self.archives()
        for change in changes:
            with self.lock:
                self.db.execute('BEGIN IMMEDIATE')
                try:
                    archives_apply(archives, change)
                    self.absorb(change)
                    self.archives_save(archives)
                    self.save()
                    self.db.execute('COMMIT')
                except BaseException:
                    self.db.execute('ROLLBACK')
                    self.load()
                    raise
            moved = True
        if moved:
            self.publish()
        return moved

    def absorb(self, change):
        """The blocks and totals of one Change."""
        commit = change.commit
        self.blank = False
        self.db.executemany(
            'INSERT OR IGNORE INTO blocks VALUES(?, ?, 0, NULL, ?, NULL, '
            'NULL, NULL)', ((name, cls.decode(), stored)
                            for name, cls, stored in sorted(change.added)))
        if commit.kind == KIND_NUKE:
            self.db.execute('DELETE FROM blocks')
            self.db.execute('DELETE FROM small')
        for link in commit.unlinked:
            self.recount(link[1], -1)
        for link in commit.linked:
            self.recount(link[1], 1)
        self.forget(change.removed)
        self.n, self.head = commit.n, change.hash
        if commit.kind == KIND_NUKE:
            self.totals = (0,) * 9
        elif commit.kind != KIND_ABORT and self.key.mix_refs:
            self.totals = note_open(self.key, commit)
        self.partial = self.unread() is not None

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

    def unread(self, most=1):
        """Names and classes of blocks whose references are not known."""
        rows = self.db.execute(
            "SELECT name, cls FROM blocks WHERE kids IS NULL AND cls <> 'c' "
            'LIMIT ?', (most,)).fetchall()
        return rows or None

    def learn(self, blocks):
        """Enter what blocks refer to: [(name, plain length, kids)]."""
        with self.lock:
            self.db.execute('BEGIN IMMEDIATE')
            for name, plain, kids in blocks:
                self.db.execute(
                    'UPDATE blocks SET plain = coalesce(?, plain), kids = ? '
                    'WHERE name = ?',
                    (plain, b''.join(kid.pack() for kid in kids), name))
                for kid in {kid.name: kid for kid in kids}.values():
                    self.db.execute(
                        'UPDATE blocks SET count = count + 1, '
                        'plain = coalesce(plain, ?) WHERE name = ?',
                        (kid.plain, kid.name))
                    if kid.cls == CHUNK:
                        self.db.execute(
                            'UPDATE blocks SET tplain = plain, tstored = '
                            'stored WHERE name = ?', (kid.name,))
            self.partial = self.unread() is not None
            self.save()
            self.db.execute('COMMIT')

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
            with self.lock:
                self.db.execute('UPDATE blocks SET tplain = ?, tstored = ? '
                                'WHERE name = ?', (plain, stored, at))
        row = self.find(name)
        return row[4], row[5]

    def totals_make(self):
        """Sum up All archives and (unique data) anew; of a whole cache."""
        whole = [self.total(row[0]) for row in self.archives().values()]
        with self.lock:
            unique = self.db.execute(
                'SELECT coalesce(sum(plain), 0), coalesce(sum(stored), 0) '
                'FROM blocks').fetchone()
        self.totals = (sum(row[0] for row in whole),
                       sum(row[1] for row in whole), *unique,
                       *self.totals[4:8], len(whole))

    # Committing what a transaction of ours did.

    def apply(self, pending, change):
        """Do what a committed transaction recorded in the file `pending`.

        One SQLite transaction, durable on return; doing it twice is doing it
        once, because the meta row names the commit it belongs to.
        """
        if self.n >= change.commit.n:
            return
        db = self.db
        with self.lock:
            db.execute('ATTACH ? AS p', (pending,))
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
                    self.archives_save(archives)
                    self.n, self.head = change.commit.n, change.hash
                    if change.commit.note:
                        self.totals = note_open(self.key, change.commit)
                    self.partial = self.unread() is not None
                    self.save()
                    db.execute('COMMIT')
                except BaseException:
                    db.execute('ROLLBACK')
                    self.load()
                    raise
            finally:
                db.execute('DETACH p')

    def archives_save(self, archives):
        """The table is small: one row for each archive."""
        old = self.archives()
        for archive in old:
            if archive not in archives:
                self.db.execute('DELETE FROM archives WHERE id = ?',
                                (archive,))
        for archive, row in archives.items():
            if old.get(archive) != row:
                self.db.execute('INSERT OR REPLACE INTO archives '
                                'VALUES(?, ?, ?, ?, ?)', (archive, *row))

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
        self.lock = threading.RLock()
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
            self.db.execute('ATTACH ? AS p', (pending,))
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
        for row in rows.fetchall():
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
SMALLS = 60000              # small files' places kept in memory
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
        self.rows = {'delta': [], 'small': [], 'memo': [], 'borrowed': []}
        self.lock = threading.Lock()        # guards rows

    def add(self, table, row):
        with self.lock:
            self.rows[table].append(row)
            full = len(self.rows[table]) >= 5000
        if full:
            self.flush()

    def flush(self):
        """Move collected rows into the file."""
        with self.lock:
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
        with self.lock:
            for table, rows in self.rows.items():
                rows.clear()
                self.db.execute('DELETE FROM %s' % table)
        if 'commit' in self.meta:
            self.set(commit=None)

    def small(self, digest):
        """Packed extents of a small file of this run."""
        with self.lock:
            row = self.db.execute('SELECT extents FROM small WHERE '
                                  'digest = ?', (digest,)).fetchone()
        return row and row[0]

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

    __slots__ = ('cls', 'plain', 'stored', 'tplain', 'tstored', 'used')

    def __init__(self, cls, stored=0, used=True):
        self.cls = cls
        self.plain = 0          # bytes of its own
        self.stored = stored    # bytes; 0 while it is being made
        self.tplain = 0         # with everything below
        self.tstored = 0
        self.used = used        # by the walk under way


class Sink:
    """What a Transaction and a DryRun do alike: know blocks by name.

    `own` has the blocks of this run, `cache` those stored before.
    """

    def __init__(self, cache):
        self.cache = cache              # Cache, or None
        self.lock = threading.RLock()   # guards everything of a sink
        self.own = {}                   # name -> Own, since the last commit
        self.sums = {}                  # name -> totals() of others' blocks
        self.plains = {}                # name -> length of others' chunks
        self.smalls = {}                # digest -> packed extents
        self.over = False               # the walk under way is given up
        self.new = [0, 0]               # New data since the last commit
        self.sent_bytes = 0             # of blocks, in the whole run
        self.slow = False               # the network, not the processor, is

    def borrow(self, name):
        """A block stored before is used by this run."""

    def check(self):
        """Restart in every thread, once one of them met it: what this run
        put may be neither in `own` nor in the cache then.
        """
        if self.over:
            raise Restart

    def claim(self, name, cls):
        """None if the caller must make and put this block; else its Own or
        its row in the cache, which is then borrowed.
        """
        with self.lock:
            self.check()
            own = self.own.get(name)
            if own is not None and own.used:
                return own
            if own is not None:         # put before a restart, noted anew
                own.used = True
                return None
            row = self.cache and self.cache.find(name)
            if row is not None:
                self.borrow(name)
                return row
            self.own[name] = Own(cls)
            return None

    def plain(self, name):
        """Plain length of a stored block, borrowed by this; None if there
        is none, or it is not known.
        """
        with self.lock:
            own = self.own.get(name)
            if own is not None:
                return own.plain if own.used and own.stored else None
            row = self.cache and self.cache.find(name)
            plain = row and (row[2] or self.plains.get(name))
            if plain is not None:
                self.borrow(name)
            return plain

    def totals(self, name):
        """(plain, stored) of a block with everything below it.

        None while another thread is making it.
        """
        with self.lock:
            self.check()
            own = self.own.get(name)
            if own is not None:
                return (own.tplain, own.tstored) if own.stored else None
            if name in self.sums:
                return self.sums[name]
        return self.cache.total(name)

    def chunk_totals(self, kid):
        """totals() of a chunk: another host's length stands in its parents
        only.
        """
        with self.lock:
            self.check()
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
        self.spilled = False            # smalls of this run are in pending
        self.pace = [time.monotonic(), 0.0]     # since when, waited so long
        self.changed = False            # the server's state, by us
        self.channel = None
        self.refused = None             # why it cannot be resumed
        self.pending = Pending(cache.path)
        self.tid = self.pending.meta.get('tid') or os.urandom(16)
        self.lineage = os.urandom(16)
        # What a dead run noted is of no use, and a power cut may have torn it.
        self.pending.remove()
        self.pending = Pending(cache.path)
        self.pending.set(tid=self.tid)

    @property
    def base(self):
        return self.cache.n, self.cache.head

    # Sending.

    def begin(self):
        """Open the transaction, adopting what the server holds of it."""
        with self.lock:
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
        return held

    def resume(self):
        """Go on after a lost connection; the lock is held.

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
                    self.over = True
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
            except Error as e:
                self.refused = e
                raise

    def adopt(self, held):
        """Own exactly what the server holds; nothing of it is used yet."""
        self.window.clear()
        self.window_bytes = 0
        self.own.clear()
        self.order.clear()
        self.gone.clear()
        for name, cls, stored in held:
            self.own[name] = Own(cls, stored, False)
            self.order += name

    def enqueue(self, kind, body):
        self.window.append((kind, body))
        self.window_bytes += len(body)
        self.channel.push(kind, body)

    def send(self, kind, body):
        """Send a frame that has no answer; waits while the window is full."""
        if self.refused:        # another thread was told
            raise self.refused
        try:
            self.enqueue(kind, body)
            start = time.monotonic()
            self.drain(PUT_WINDOW)
            self.pace_note(start, time.monotonic())
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
        with self.lock:
            self.check()
            own = self.own[name]
            fresh = not own.stored
            own.stored = own.stored or len(sealed)
            self.note(name, cls, own, plain, kids, totals)
            if fresh or self.cache.find(name) is None:
                self.new[0] += plain
                self.new[1] += own.stored
            if fresh:
                self.order += name
                self.gone.discard(name)
                self.sent_bytes += len(sealed)
                self.send(PUT, name + cls + sealed)

    def note(self, name, cls, own, plain, kids, totals):
        """The rows of a new block in `pending`."""
        own.plain = plain
        own.tplain, own.tstored = totals or (plain, own.stored)
        self.delta(name, cls, plain, own.stored, own.tplain, own.tstored,
                   kids)

    def delta(self, name, cls, plain, stored, tplain, tstored, kids):
        """What committing a block does to its row and to those it names."""
        packed = b''.join(kid.pack() for kid in kids)
        self.pending.add('delta', (
            name, None, cls.decode(), 0, plain, stored, tplain, tstored,
            None if cls == CHUNK else packed))
        for kid in {kid.name: kid for kid in kids}.values():
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
        if len(self.smalls) > SMALLS:
            self.pending.flush()
            self.smalls.clear()
            self.spilled = True

    def small(self, digest):
        if self.spilled and digest not in self.smalls:
            packed = self.pending.small(digest)
            if packed:
                return small_unpack(digest, packed)
        return super().small(digest)

    def add_memo(self, row):
        self.pending.add('memo', row)

    def again(self):
        """Start the walk over: what was put stays, what was noted goes."""
        with self.lock:
            self.over = False
            self.pending.reset()
            self.sums.clear()
            self.smalls.clear()
            self.spilled = False
            self.new = [0, 0]
            for own in self.own.values():
                own.used = False

    def withdraw(self, names):
        """Take back puts that will not be linked."""
        with self.lock:
            self.gone.update(names)     # before: resume() must know
            self.order = bytearray(b''.join(
                name for name in names_split(self.order)
                if name not in self.gone))
            for name in names:
                del self.own[name]
            try:
                self.withdraw_post(names)
            except ChannelLost:
                self.resume()

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
        with self.lock:
            unused = [name for name, own in self.own.items() if not own.used]
            if unused:
                self.withdraw(unused)
        while True:
            record = make_record(self.base)
            raw = self.commit_object(record, state)
            self.pending.set(profile=profile, state=bytes([state]))
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
                with self.lock:
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
        """
        try:
            with self.lock:
                self.resume()
        except (Restart, Refused):
            found = commit_decided(self.remote, self.base, raw)
            if not found:
                raise
            self.over, self.refused = False, None
            self.remote.close()         # what goes on begins anew
            return found
        return None

    def rebase(self, record):
        """Go on from the newest commit after somebody else's.

        The record names its base, so it is withdrawn and made again.  Raises
        Restart if a block we borrowed is gone.
        """
        changes = list(history_changes(self.remote, self.base))
        self.cache.catch_up(changes)
        if self.part and self.part[0] not in self.cache.archives():
            self.part = None            # somebody deleted our checkpoint
        with self.lock:
            if self.channel.failed:
                self.resume()
            self.withdraw([record.name])
            # What others put as well is theirs: the first copy counts.
            new = [own for name, own in self.own.items()
                   if own.used and self.cache.find(name) is None]
            self.new = [sum(own.plain for own in new),
                        sum(own.stored for own in new)]
            self.pending.flush()
            self.pending.db.execute('DELETE FROM delta WHERE name = ?1 OR '
                                    'parent = ?1', (record.name,))
        removed = [name for change in changes for name in change.removed]
        if any(change.commit.kind == KIND_NUKE for change in changes) or \
                (removed and self.pending.borrowed(removed)):
            raise Restart

    def committed(self, change, record, state, memo, profile):
        """Our commit stands: bring the cache directory up to it."""
        self.changed = True
        self.pending.close()
        self.cache.apply(self.pending.path, change)
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
        self.spilled = False
        self.part = None
        if state == OPEN:
            # The count of RECEIVED goes on: it is since BEGIN, as `first`.
            self.part = (record.archive, record.name)
            self.window.clear()
            self.window_bytes = 0
            self.pending.__init__(self.cache.path)
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

    It is sent once more if that is open and the key can write.  Of a damaged
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
    if found is None and remote.key.can(ROLE_WRITE):
        found = pending_send(remote, cache, commit, raw)
    return found


def pending_send(remote, cache, commit, raw):
    """Send an undecided commit of a dead run once more; as commit_decided().

    If the server cannot take it any more, an empty commit takes its number,
    so that it is dead for ever.
    """
    try:
        return commit_alone(remote, commit, commit.linked[0][2], raw)
    except Refused:
        found = commit_decided(remote, (commit.n - 1, commit.previous), raw)
        if found is None:
            plain_commit(remote, cache, Commit(
                cache.key.machine, commit.n, commit.previous, KIND_ABORT,
                os.urandom(16)), cache.archives())
            # Or `raw` was under way after all, and was first.
            found = commit_decided(remote, (commit.n - 1, commit.previous),
                                   raw)
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
        rows = cache.unread(512)
        if not rows:
            return
        classes = dict(rows)
        body = b'\x01' + names_join(list(classes))
        learned = []
        for kind, answer in remote.ask(GET, body):
            if kind != BLOCK:
                continue
            name, block = answer[:32], answer[32:]
            if name not in classes:
                raise CorruptError('The server sent a block nobody asked for')
            learned.append(refs_learn(opener, names, name,
                                      classes[name].encode(), block))
        cache.learn(learned)


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


class Folder:
    """A directory being walked, or met on the way; its descriptor is opened
    again, and known again, after it had to be closed.
    """

    __slots__ = ('above', 'name', 'fd', 'identity', 'follow', 'open_set')

    def __init__(self, above, name, open_set, follow=False):
        self.above = above          # Folder, or None for a top one
        self.name = name            # bytes, below `above`
        self.fd = -1
        self.identity = None        # (st_dev, st_ino) when first opened
        self.follow = follow        # may be a symbolic link
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
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK
        if not self.follow:
            flags |= os.O_NOFOLLOW
        fd = os.open(self.name, flags,
                     dir_fd=self.above.fd if self.above else None)
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
        """`items` are ('cd', directory) and ('path', operand) in order.

        `report(text)` counts an error; `skip` has (st_dev, st_ino) of
        directories never entered.
        """
        self.items = items
        self.opt = opt
        self.report = report
        self.skip = set(skip)
        self.open_set = collections.OrderedDict()
        self.slashed = False            # the leading-slash warning was given
        self.types = None               # st_dev -> file system type

    def __iter__(self):
        base = Folder(None, b'.', self.open_set, True)
        for kind, value in self.items:
            if kind == 'cd':
                base = Folder(base, value, self.open_set, True)
                try:
                    base.get()
                except OSError as e:
                    raise UserError('Cannot change to directory %s: %s' % (
                        show(value), e.strerror)) from None
            else:
                yield from self.operand(base, value)

    def close(self):
        """Close every directory still open."""
        for folder in list(self.open_set):
            folder.close()

    def operand(self, base, path):
        """Everything below one operand."""
        member = self.member(path)
        follow = self.opt.follow_operands or self.opt.follow_all
        try:
            st = self.stat(path, base, follow)
        except OSError as e:
            self.report('%s: Cannot stat: %s' % (show(path), e.strerror))
            return
        if self.unwanted(member, st):
            return
        yield base, path, member, st
        if stat.S_ISDIR(st.st_mode) and self.opt.recurse:
            yield from self.descend(Folder(base, path, self.open_set, follow),
                                    member, st)

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

    def member(self, path):
        """The name an operand gets in the archive."""
        member = path.rstrip(b'/') or b'/'
        if self.opt.absolute or not member.startswith(b'/'):
            return member
        if not self.slashed and not self.opt.quiet:
            warn('Removing leading \'/\' from member names')
        self.slashed = True
        return member.lstrip(b'/') or b'.'

    def descend(self, top, member, st):
        """Below a directory, its own entry left out."""
        device = st.st_dev
        stack = []
        self.push(stack, top, member, st, None, device)
        follow = self.opt.follow_all
        while stack:
            folder, names, prefix, held = stack[-1]
            for name in names:
                child = prefix + name
                try:
                    st = self.stat(name, folder, follow)
                except OSError as e:
                    self.report('%s: Cannot stat: %s'
                                % (show(child), e.strerror))
                    continue
                if self.unwanted(child, st):
                    continue
                yield folder, name, child, st
                if stat.S_ISDIR(st.st_mode):
                    below = Folder(folder, name, self.open_set, follow)
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
        names.sort()
        above = parents[0] | {here} if parents and self.opt.follow_all \
            else frozenset((here,))
        stack.append((folder, iter(names), member.rstrip(b'/') + b'/',
                      (above, st.st_dev)))

    def unwanted(self, member, st):
        """True for what never goes into an archive."""
        patterns = self.opt.patterns
        if patterns and (patterns.excluded(member)
                         or not patterns.included(member)):
            return True
        if stat.S_ISSOCK(st.st_mode):
            return True
        if self.skip and (st.st_dev, st.st_ino) in self.skip:
            if not self.opt.quiet:
                warn('Not adding cache directory to archive: %s'
                     % show(member))
            return True
        return False

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
# Create: reading files
#
# What is in a file, as chunks of its own or a share of chunks with its
# neighbours.  Chunks are named, looked up, deflated and sealed by a pool of
# threads, in jobs of about 1 MiB; AES calls hold the interpreter's lock,
# deflate and HMAC do not.  Knows files and chunks, not pages.
##############################################################################

SHARED_BELOW = 32 * KIB     # shorter files share chunks
READ = MIB                  # of a large file, at once
JOB = MIB                   # plain bytes in one job of the pool
LINKS = 100000              # inodes remembered until all names are seen
SAMPLE = 32                 # one chunk in so many is opened again and compared
SAMPLE_FIRST = 100          # and these of each run


class Ref:
    """A chunk on its way: its name is known when its job is done."""

    __slots__ = ('data', 'name', 'plain', 'job')

    def __init__(self, data, name=None):
        self.data = data            # bytes, until the job has taken them
        self.name = name
        self.plain = len(data) if data is not None else 0
        self.job = None             # Future, None once done


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


class Pool:
    """Jobs of about 1 MiB, a few of them under way at a time."""

    def __init__(self, job):
        from concurrent.futures import ThreadPoolExecutor
        workers = max(2, os.cpu_count() or 1)
        self.executor = ThreadPoolExecutor(workers)
        self.most = 2 * workers + 2
        self.job = job                      # function of a list of Refs
        self.batch = []
        self.bytes = 0
        self.under_way = collections.deque()

    def add(self, ref):
        """Hand in a chunk."""
        self.batch.append(ref)
        self.bytes += ref.plain
        if self.bytes >= JOB:
            self.flush()

    def flush(self):
        """Start the job collected so far."""
        if not self.batch:
            return
        future = self.submit(self.job, self.batch)
        for ref in self.batch:
            ref.job = future
        self.batch, self.bytes = [], 0

    def submit(self, function, *args):
        """Run a function in the pool; waits while too much is under way."""
        while len(self.under_way) >= self.most:
            self.under_way.popleft().result()
        future = self.executor.submit(function, *args)
        self.under_way.append(future)
        return future

    def name(self, ref):
        """The name of a chunk, waiting for it."""
        if ref.name is None:
            if ref.job is None:
                self.flush()
            ref.job.result()
        return ref.name

    def finish(self):
        """Wait for everything; raises what a job raised."""
        self.flush()
        while self.under_way:
            self.under_way.popleft().result()

    def drop(self):
        """Wait for everything and forget it, after a Restart."""
        self.batch, self.bytes = [], 0
        while self.under_way:
            try:
                self.under_way.popleft().result()
            except (Error, Restart):
                pass

    def close(self):
        """Stop; what has not begun never will."""
        self.executor.shutdown(wait=False, cancel_futures=True)


class SharedStream:
    """Small files' contents, concatenated in walk order and cut as one.

    A new stream begins where the owner changes, so that nobody's bytes are
    deflated together with another's.
    """

    def __init__(self, cut_key, pool):
        self.cutter = Cutter(cut_key)
        self.pool = pool
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
        chunk = self.cutter.finish()
        if chunk:
            self.cut(chunk)

    def cut(self, chunk):
        """Give a finished chunk to the files whose bytes are in it."""
        ref = Ref(chunk)
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
        self.pool.add(ref)


class ExtentTree:
    """The extents of a large file, as lists; flat in memory.

    A list ends after an extent whose chunk's name begins with 8 zero bits,
    at the latest after LIST_MOST.
    """

    def __init__(self, writer):
        self.writer = writer            # has put_index() and pool
        self.waiting = collections.deque()
        self.last = None                # (Ref, offset, length, repeat)
        self.extents, self.kids, self.numbers = [], [], {}
        self.bytes = 0
        self.lists = []                 # (Kid, bytes) of level 1

    def add(self, extent):
        self.waiting.append(extent)
        if len(self.waiting) > 256:
            self.take(self.waiting.popleft())

    def take(self, extent):
        """Enter the next extent; one like the last only repeats it."""
        last = self.last
        if last and last[0] and extent[0] and last[1:3] == extent[1:3] and \
                self.writer.pool.name(last[0]) == \
                self.writer.pool.name(extent[0]):
            self.last = (*last[:3], last[3] + 1)
            return
        self.last = extent
        if last:
            self.write(*last)

    def write(self, ref, offset, length, repeat):
        """Append one extent; its chunk's name is waited for."""
        ends, number = False, HOLE
        if ref is not None:
            name = self.writer.pool.name(ref)
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
        """(level, Kids) of the top lists, at most MOST_EXTENTS of them."""
        while self.waiting:
            self.take(self.waiting.popleft())
        if self.last:
            self.write(*self.last)
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

    def __init__(self, writer, cut_key):
        self.writer = writer
        self.pool = writer.pool
        self.cut_key = cut_key
        self.cutter = Cutter(cut_key)
        self.shared = SharedStream(cut_key, self.pool)
        self.changed = False        # the last file changed under us
        self.grown = False          # and is longer than it was

    def read(self, fd, st):
        """The Content of the open file `fd`, whose fstat was `st`.

        The length stored is the length read, at most the length it had.
        """
        content = Content()
        if st.st_size < SHARED_BELOW:
            content = self.read_small(fd, st, content)
        elif st.st_blocks * 512 < st.st_size and self.sparse(fd, st):
            self.read_sparse(fd, st, content)
        else:
            self.read_range(fd, 0, st.st_size, content)
        if content.tree:
            content.tree = content.tree.finish()
        after = os.fstat(fd)
        self.grown = after.st_size > st.st_size
        self.changed = content.size != st.st_size or (
            after.st_mtime_ns, after.st_ctime_ns, after.st_size) != (
            st.st_mtime_ns, st.st_ctime_ns, st.st_size)
        return content

    def read_small(self, fd, st, content):
        """A file for the shared stream, or the Content of an equal one."""
        data = read_exactly(fd, st.st_size)
        content.size = len(data)
        if data:
            content.digest = self.writer.names.content(data)
            known = self.writer.small_find(content.digest)
            if known:
                return known
            self.writer.small_note(content)
            self.shared.add(content, data, st.st_uid)
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
            if self.read_range(fd, data, pos, content) < pos - data:
                break                       # it was cut short meanwhile

    def read_range(self, fd, start, end, content):
        """Cut bytes `start` to `end`; how many there were.

        What is no longer than the longest chunk is one chunk, uncut.
        """
        left = end - start
        if left <= CHUNK_MAX:
            data = pread_exactly(fd, left, start)
            if data:
                self.chunk(content, data)
            return len(data)
        pos = start
        self.cutter.finish()        # what a file that failed may have left
        while pos < end:
            data = os.pread(fd, min(READ, end - pos), pos)
            if not data:
                break
            pos += len(data)
            for chunk in self.cutter.feed(data):
                self.chunk(content, chunk)
        chunk = self.cutter.finish()
        if chunk:
            self.chunk(content, chunk)
        return pos - start

    def chunk(self, content, data):
        ref = Ref(data)
        self.pool.add(ref)
        self.extent(content, ref, 0, len(data))

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
PAGES_WAITING = 64          # pages held open by the shared stream at most
RACY = 2 * BILLION          # ns: a file this fresh may change unseen
FIRST_TIME = -1 << 63       # ns since 1970: the year 1677
LONGEST_KEY = 60000         # bytes of a member name in the memo
XATTRS_INLINE = 64 * KIB    # bytes of one entry's attributes, all in all
XATTRS_MOST = MIB           # the same, with those that are chunks
XATTRS_CHUNKS = 1024        # of one entry, so that it fits a page
NO_XATTRS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODATA)
LEVEL_SLOW = 6              # of deflate, while the network is what limits
FORMAT = b'1'               # part of every profile: rows of another format

STAT_KEY = struct.Struct('>IQqqQQI')


class Page:
    """A page being filled: entries, and what the memo keeps of them."""

    __slots__ = ('entries', 'keys', 'first', 'rows', 'kids', 'bytes',
                 'whole')

    def __init__(self, first):
        self.first = first      # member name of the first entry
        self.entries = []       # (Entry, Content or None, xattr Refs)
        self.keys = []          # stat key of each, b'' if it never matches
        self.rows = 0           # bytes of rows, about
        self.kids = 0           # at most so many
        self.bytes = 0          # of files in it
        self.whole = True       # False: next time look at each entry


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

    def __init__(self, opt, key, sink, cache=None, memo=None):
        """`sink` is a Transaction, or a DryRun that only counts."""
        self.opt = opt
        self.key = key
        self.sink = sink
        self.cache = cache
        self.memo = memo
        self.names = Names(key)
        self.sealer = Sealer(key, pad=opt.pad)
        self.page_key = hmac.digest(key.k_cut, b'page', 'sha256')
        self.cut_key = hmac.digest(key.k_cut, b'cut', 'sha256')[:16]
        self.pool = Pool(self.chunks_make)
        self.errors = 0                 # entries that could not be stored
        self.chunks = 0                 # made in this run, for the sample
        self.owners = {}                # (uid, gid) -> packed, with names
        self.profile = b''
        self.start_over()

    def start_over(self):
        """State of one walk; called again after a Restart."""
        self.errors = 0
        self.reader = FileReader(self, self.cut_key)
        self.ahead = collections.deque()    # entries of the walk looked at
        self.page = None
        self.waiting = collections.deque()  # full pages, in order
        self.pages = []                     # (Kid, (first, entries, bytes))
        self.entries = self.bytes = 0
        self.links = {}                     # (dev, ino) -> [Content, left]
        self.systems = {}                   # st_dev -> ordinal in this run
        self.small = {}                     # digest -> Content, recent
        self.seen = []                      # Seen pages not passed yet
        self.previous = None                # components of the last member
        self.sorted = True
        self.now = time.time_ns()

    # Chunks and index blocks, in the pool.

    def chunks_make(self, refs):
        """A job: name chunks, and store those that are new."""
        for ref in refs:
            data, ref.data = ref.data, None
            name = self.names.chunk(data)
            found = self.sink.claim(name, CHUNK)
            if found is None:
                sealed = self.seal(CHUNK, name, [data])
                self.sink.put(name, CHUNK, sealed, len(data))
            elif isinstance(found, tuple) and found[2] is None:
                self.sink.plains[name] = len(data)
            ref.name = name

    def seal(self, cls, name, parts):
        """The sealed block; opened again and compared, all or a sample."""
        level = LEVEL_SLOW if self.sink.slow else None
        sealed = self.sealer.seal(cls, name, parts, level)
        self.chunks += 1
        if cls != CHUNK or self.opt.verify_encode or \
                self.chunks <= SAMPLE_FIRST or not self.chunks % SAMPLE:
            self.sealer.check(cls, name, parts, sealed)
        return sealed

    def put_index(self, kind, level, kids, rows):
        """Store a page or list unless it is stored; its Kid.

        Sealing is done by the pool; only what names other index blocks has
        to wait for them, to know their sizes.
        """
        digest = self.names.rows(rows)
        refs = index_refs(kind, level, digest, kids)
        name = self.names.index(refs)
        plain = len(refs) + len(rows)
        found = self.sink.claim(name, INDEX)
        if found is None:
            self.pool.submit(self.index_make, name, INDEX, [refs, rows],
                             plain, kids, self.below(kids))
        elif isinstance(found, tuple) and found[4] is None:
            self.sink.known(name, found, plain, kids, self.below(kids))
        return Kid(INDEX, name, plain)

    def below(self, kids):
        """(plain, stored) of all that `kids` name, waited for."""
        sums = self.sink.below(kids)
        if sums is None:
            self.pool.finish()
            sums = self.sink.below(kids)
        return sums

    def index_make(self, name, cls, parts, plain, kids, sums):
        """A job: seal and store an index block or a record."""
        sealed = self.seal(cls, name, parts)
        self.sink.put(name, cls, sealed, plain, kids,
                      (plain + sums[0], len(sealed) + sums[1]))

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
            ref = Ref(None, name)
            ref.plain = plain
            content.extents.append((ref, offset, length, 1))
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
                (self.pool.name(ref), ref.plain, offset, length)
                for ref, offset, length, _ in content.extents]))

    # The walk.

    def run(self, walk, due=lambda: False, checkpoint=None):
        """Take in a whole walk; checkpoint() is called where due() says so,
        after an entry, which ends its page.
        """
        source = iter(walk)
        while self.look(source, 1):
            if self.page is not None or not self.reuse(source):
                self.page = self.page or Page(self.ahead[0][2])
                self.add(*self.ahead.popleft())
            if due():
                self.page_end()
                checkpoint()
        self.page_end()
        self.finish_pages(True)

    def finish_pages(self, final):
        """Have every page stored that was ended; `final` at the end."""
        self.reader.shared.flush()
        self.settle(0, final)
        self.pool.finish()

    def checkpointed(self):
        """After a checkpoint what was put before it counts as borrowed."""
        self.links.clear()
        self.small.clear()
        for kid, _ in self.pages:
            self.sink.borrow(kid.name)

    def look(self, source, count):
        """Have up to `count` entries in `ahead`; how many there are."""
        ahead = self.ahead
        while len(ahead) < count:
            entry = next(source, None)
            if entry is None:
                break
            ahead.append((*entry, self.stat_key(entry[2], entry[3])))
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
        fresh = self.now - RACY
        mtime, ctime = st.st_mtime_ns, st.st_ctime_ns
        if mtime > fresh or ctime > fresh or min(mtime, ctime) < FIRST_TIME \
                or len(member) > LONGEST_KEY:
            return b''
        owner = self.owner(st)
        if stat.S_ISDIR(st.st_mode):
            key = STAT_KEY.pack(st.st_mode, 0, mtime, ctime, st.st_ino, 0, 0)
        else:
            key = STAT_KEY.pack(st.st_mode, st.st_size, mtime, ctime,
                                st.st_ino, st.st_rdev, st.st_nlink)
            if st.st_nlink > 1:
                key += U32.pack(self.system(st.st_dev))
        if self.opt.store_atime:
            key += b'atime' if stat.S_ISDIR(st.st_mode) else ATIME.pack(
                *divmod(st.st_atime_ns, BILLION))
        return b'%b%b%b' % (key, owner, member)

    def owner(self, st):
        """(uid, gid) with their names, packed; looked up once."""
        found = self.owners.get((st.st_uid, st.st_gid))
        if found is None:
            uname, gname = owner_names(st.st_uid, st.st_gid)
            found = struct.pack('>II', st.st_uid, st.st_gid) + \
                uname + b'\0' + gname + b'\0'
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
        for _ in range(entries):
            entry = self.ahead.popleft()
            self.order(entry[2])
            if self.opt.verbose:
                self.say(entry[2])
        self.entries += entries
        self.bytes += size
        self.waiting.append((Kid(INDEX, name, claimed),
                             (first, entries, size)))
        self.sink.add_memo((memo_first(first), self.profile, None, name,
                            entries, size, 0, b'', b'', memo))
        return True

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

    def say(self, member):
        """The line of -v."""
        sys.stderr.write('a %s\n' % show(member))

    # Entries.

    def add(self, folder, name, member, st, key):
        """Read one entry into the page."""
        if len(member) > LONGEST_PATH:
            self.report('%s...: path too long' % show(member[:60]))
            self.page.whole = False
            return
        self.order(member)
        old = self.unchanged(member, key)
        if old:
            self.page_add(*old, key)
        else:
            try:
                self.read(folder, name, member, st, key)
            except OSError as e:
                self.report('%s: Cannot read: %s' % (show(member),
                                                     e.strerror or e))
                self.page.whole = False
        if self.opt.verbose:
            self.say(member)
        if self.page and self.page_ends(member):
            self.page_end()

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
        refs = {}

        def ref(number):
            kid = seen.kids[number]
            if number not in refs:
                if self.usable(kid.name) != kid.plain:
                    raise KeyError
                refs[number] = Ref(None, kid.name)
                refs[number].plain = kid.plain
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
                    kids = [seen.kids[number] for number in entry.lists]
                    for kid in kids:
                        ref(entry.lists[kids.index(kid)])
                    content.tree = (entry.level, kids)
        except KeyError:
            return None
        return entry, content, xattrs

    def read(self, folder, name, member, st, key):
        """Open, stat and read one entry; OSError if that fails."""
        entry = Entry()
        entry.path = member
        content, xattrs = None, []
        if stat.S_ISREG(st.st_mode):
            fd = os.open(name, self.open_flags(), dir_fd=folder.get())
            try:
                st = os.fstat(fd)
                if not stat.S_ISREG(st.st_mode):
                    raise OSError(errno.ESTALE, 'Changed into something else')
                self.fill(entry, st)
                entry.xattrs, xattrs = self.attributes(fd)
                content = self.content(fd, st)
            finally:
                os.close(fd)
            entry.size = content.size
            key = self.read_outcome(member, st, key)
        else:
            self.fill(entry, st)
            if entry.kind == SYMLINK:
                entry.target = os.readlink(name, dir_fd=folder.get())
            entry.xattrs, xattrs = self.attributes(
                os.path.join(b'/proc/self/fd/%d' % folder.get(), name),
                following=self.opt.follow_all)
        self.page_add(entry, content, xattrs, key)

    def open_flags(self):
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        if not (self.opt.follow_all or self.opt.follow_operands):
            flags |= os.O_NOFOLLOW
        return flags

    def read_outcome(self, member, st, key):
        """The key of a file just read: none if it changed meanwhile."""
        if self.reader.grown and not self.opt.quiet:
            warn('%s: file may have grown while being archived'
                 % show(member))
        if self.reader.changed:
            return b''
        return key and self.stat_key(member, st)

    def fill(self, entry, st):
        """The fields that come from stat."""
        entry.kind = KIND_OF_MODE[stat.S_IFMT(st.st_mode)]
        entry.mode = stat.S_IMODE(st.st_mode)
        entry.uid, entry.gid = st.st_uid, st.st_gid
        names = self.owner(st)[8:].split(b'\0')
        entry.uname, entry.gname = names[0], names[1]
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
        xattrs, refs, size = [], [], 0
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
        for name in sorted(map(os.fsencode, names)):
            try:
                value = os.getxattr(where, name, **options)
            except OSError as e:
                if e.errno not in NO_XATTRS:
                    raise
                continue            # gone meanwhile
            size += len(name) + len(value)
            if size > XATTRS_MOST or len(refs) >= XATTRS_CHUNKS:
                raise OSError(errno.E2BIG, 'Too many extended attributes')
            if len(value) > INLINE_XATTR or size > XATTRS_INLINE:
                ref = Ref(value)
                self.pool.add(ref)
                refs.append(ref)
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
            len(entry.uname) + len(entry.gname) + sum(
                len(name) + (len(value) if isinstance(value, bytes) else 4)
                + 6 for name, value in entry.xattrs)
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
        digest = hmac.digest(self.page_key, member, 'sha256')
        return digest[0] == 0 and digest[1] < 128

    def page_end(self):
        """Close the page; it waits until its chunks are cut and named."""
        page, self.page = self.page, None
        if page and page.entries:
            self.waiting.append(page)
            if len(self.waiting) > PAGES_WAITING:
                self.reader.shared.flush()
            self.settle(4)

    def settle(self, most, final=False):
        """Finish full pages in order until `most` are left, if they can be.

        Reused pages wait in the same queue, so that order is kept.
        """
        while self.waiting:
            page = self.waiting[0]
            if isinstance(page, Page):
                if len(self.waiting) <= most:
                    return
                if any(content is not None and content.left
                       for _, content, _ in page.entries):
                    return
                row = self.page_make(page, final
                                     and len(self.waiting) == 1)
            else:
                row = page
            self.waiting.popleft()
            self.pages.append(row)

    def page_make(self, page, final):
        """Rows and references of a page; stored, and noted for the memo."""
        kids, numbers, uses = [], {}, {}

        def number(name, plain, times, cls=CHUNK):
            at = numbers.setdefault(name, len(kids))
            if at == len(kids):
                kids.append(Kid(cls, name, plain, 0))
            return at, times

        rows = []
        for entry, content, xattrs in page.entries:
            first = not entry.link or entry.link not in uses
            self.page_entry(entry, content, xattrs, number, kids, first)
            if entry.link:
                uses[entry.link] = True
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

    def page_entry(self, entry, content, xattrs, number, kids, first):
        """Give an entry's Refs their kid numbers."""
        def count(at, times):
            kids[at].times += times
            return at

        if xattrs:
            places = [count(*number(self.pool.name(ref), ref.plain, 1))
                      for ref in xattrs]
            refs = iter(places)
            entry.xattrs = tuple(
                (name, next(refs) if isinstance(value, int) else value)
                for name, value in entry.xattrs)
        if content is None:
            return
        entry.digest = content.digest
        if content.tree:
            entry.level, lists = content.tree
            entry.extents = ()
            entry.lists = tuple(
                count(*number(kid.name, kid.plain, first, INDEX))
                for kid in lists)
            return
        entry.lists = ()
        extents = []
        for ref, offset, length, repeat in content.extents:
            at = HOLE
            if ref is not None:
                at, _ = number(self.pool.name(ref), ref.plain, 0)
                if content.shared:
                    kids[at].times = 1
                elif first:
                    kids[at].times += repeat
            extents.append((at, offset, length, repeat))
        entry.extents = tuple(extents)
        if content.shared and not content.left:
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
        record.created = self.opt.creationtime or int(self.now // BILLION)
        record.argv = argv_cut(self.opt.argv)
        record.host = os.fsencode(os.uname().nodename)
        parts = record_pack(record, self.key)
        record.name = self.names.record(parts[0])
        plain = record_plain(parts)
        self.sink.claim(record.name, RECORD)
        self.index_make(record.name, RECORD, parts, plain, kids,
                        self.below(kids))
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
        with self.lock:
            own = self.own[name]
            own.plain, own.stored = plain, len(sealed)
            own.tplain, own.tstored = totals or (plain, len(sealed))
            self.new[0] += plain
            self.new[1] += len(sealed)

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

GET_REFS, GET_WHOLE = U8.pack(1), U8.pack(3)


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


class Fetcher:
    """Blocks of one machine, by name; close() it after use."""

    def __init__(self, remote):
        self.remote = remote
        self.key = remote.key
        self.opener = Opener(remote.key)
        self.names = Names(remote.key)
        # A pruning key opens what a block refers to, and nothing else.
        self.view = GET_WHOLE if self.key.data_priv else GET_REFS
        self.changed = threading.Condition()    # guards all below
        self.channel = None         # where requests go; None while it is lost
        self.unsent = []            # slots not asked for yet
        self.unsent_bytes = 0
        self.requests = collections.deque()     # (id or None, deque of slots)
        self.flying = {}            # name -> slot not done yet
        self.kept = collections.OrderedDict()   # name -> slot done, shared
        self.kept_bytes = 0
        self.fetched = 0            # blocks asked for
        self.fatal = None           # why nothing more will come
        self.closed = False
        self.turn = threading.Lock()            # one thread at a time listens
        self.threads = []

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
            while not slot.done:
                self.changed.wait()

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()

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
        """Connect, and start the threads."""
        self.channel = self.remote.connect()
        for _ in range(max(2, os.cpu_count() or 1)):
            thread = threading.Thread(target=self.work, daemon=True)
            self.threads.append(thread)
            thread.start()

    def finish(self, slot, value, error):
        """Give `slot` its value or error, and wake who waits for it."""
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

    # The threads: one listens, the others decode.

    def work(self):
        """A thread: receive a block, let the next one listen, decode."""
        while True:
            with self.turn:
                slot, body = self.receive()
            if slot is None:
                return
            try:
                value, error = self.decode(slot.kid, body), None
            except Error as e:
                value, error = None, e
            except Exception as e:      # a thread must not die unheard
                value, error = None, CorruptError('block %s: %s: %s' % (
                    slot.kid.name.hex()[:16], type(e).__name__, e))
            with self.changed:
                self.finish(slot, value, error)

    def receive(self):
        """The next (slot, BLOCK body); (None, None) when closed."""
        while True:
            with self.changed:
                while not self.closed and not self.requests:
                    self.changed.wait()
                if self.closed:
                    return None, None
                rid, slots = self.requests[0]
                channel = self.channel
            try:
                if rid is None or channel is None:
                    raise ChannelLost('Connection lost')
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
            self.finish(slot, None, CorruptError(
                'block %s is missing: %s' % (slot.kid.name.hex()[:16],
                                             error)))
            if error.code != E_NOBLOCK:
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
        what = 'block %s' % kid.name.hex()[:16]
        if body[:32] != kid.name:
            raise CorruptError('%s: the server sent another block in its '
                               'place' % what)
        parts = self.opener.open(kid.cls, kid.name, body[32:],
                                 self.view == GET_REFS)
        if kid.cls == CHUNK:
            found, data = self.names.chunk(parts[0]), parts[0]
            if len(data) != kid.plain:
                raise CorruptError('%s: has %d bytes, not the %d expected'
                                   % (what, len(data), kid.plain))
        elif kid.cls == INDEX:
            found = self.names.index(parts[0])
            data = found == kid.name and self.index(kid, *parts)
        else:
            found = self.names.record(parts[0])
            data = found == kid.name and record_unpack(parts, kid.name,
                                                       self.key)
        if not hmac.compare_digest(found, kid.name):
            raise CorruptError('%s: its content is not what its name says'
                               % what)
        return data

    def index(self, kid, refs, rows):
        block = index_unpack(refs, kid.name)
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
        raise UserError('Archive does not exist: %s' % show(name))
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
ACLS = (b'system.posix_acl_access', b'system.posix_acl_default')
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
        os.fchdir(fd)
        os.chroot('.')
    return fd


# Directories on the way down.


class Place:
    """A directory between the target and the entry at hand, held open."""

    __slots__ = ('name', 'fd', 'ident', 'entry', 'xattrs', 'born', 'inherits',
                 'path')

    def __init__(self, name, fd, status):
        self.name = name
        self.fd = fd            # or -1: deep in the stack, opened by '..'
        self.ident = (status.st_dev, status.st_ino)
        self.entry = None       # whose mode and times it gets when it is left
        self.xattrs = ()        # (name, value) likewise
        self.born = None        # (uid, gid) of files made in it, once known
        self.inherits = False   # modes in it come out changed by its ACL
        self.path = b''         # of entry, for messages


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
        self.numeric = numeric
        self.users = {}         # (name, id) -> id here
        self.groups = {}

    def uid(self, entry):
        key = (entry.uname, entry.uid)
        if key not in self.users:
            self.users[key] = self.find('pwd', 'getpwnam', 2, *key)
        return self.users[key]

    def gid(self, entry):
        key = (entry.gname, entry.gid)
        if key not in self.groups:
            self.groups[key] = self.find('grp', 'getgrnam', 2, *key)
        return self.groups[key]

    def find(self, module, function, field, name, number):
        if self.numeric or not name:
            return number
        import importlib
        lookup = getattr(importlib.import_module(module), function)
        try:
            return lookup(os.fsdecode(name))[field]
        except (KeyError, ValueError):
            return number


class Dresser:
    """Gives what has been made its owner, mode, attributes and times."""

    def __init__(self, opt):
        root = os.geteuid() == 0
        self.perms = root if opt.perms is None else opt.perms
        self.own = root and not opt.no_owner
        self.times = not opt.no_mtime
        self.mask = umask_read()
        self.owners = Owners(opt.numeric_owner)
        self.now = time.time_ns()
        self.said = set()       # kinds of attribute warned about

    def mode(self, entry):
        """The mode without special bits."""
        return entry.mode & 0o777 & (~0 if self.perms else ~self.mask)

    def file(self, fd, place, entry, xattrs):
        """Dress the file that was just made in `place`; fd is on it."""
        owned = True
        if self.own:
            if place.born is None:
                status = os.fstat(fd)
                place.born = (status.st_uid, status.st_gid)
            owner = (self.owners.uid(entry), self.owners.gid(entry))
            if owner != place.born:
                os.chown(fd, *owner)
        mode = self.mode(entry)
        if entry.mode & 0o7000 and self.perms:
            owned = self.own or self.same_owner(os.fstat(fd), entry)
            mode |= entry.mode & 0o7000 if owned else 0
        if mode > 0o777 or mode & self.mask or place.inherits:
            os.fchmod(fd, mode)
        if xattrs and self.perms:
            self.attributes(fd, xattrs)
        if self.times:
            self.stamp(fd, entry)

    def directory(self, place):
        """Dress a directory that is being left."""
        entry, fd = place.entry, place.fd
        if self.own:
            os.chown(fd, self.owners.uid(entry), self.owners.gid(entry))
        mode = self.mode(entry)
        if self.perms and entry.mode & 0o7000:
            mode |= entry.mode & 0o1000
            if self.own or self.same_owner(os.fstat(fd), entry):
                mode |= entry.mode & 0o6000
        os.fchmod(fd, mode)
        if place.xattrs and self.perms:
            self.attributes(fd, place.xattrs)
        if self.times:
            self.stamp(fd, entry)

    def special(self, place, name, entry, xattrs):
        """Dress a symbolic link, fifo or device, by name, following none."""
        at = {'dir_fd': place.fd, 'follow_symlinks': False}
        if self.own:
            os.chown(name, self.owners.uid(entry), self.owners.gid(entry),
                     **at)
        if entry.kind != SYMLINK and (self.mode(entry) & self.mask
                                      or place.inherits):
            self.mode_by_path(place, name, entry)
        if xattrs and self.perms and os.path.isdir('/proc/self/fd'):
            self.attributes(b'/proc/self/fd/%d/%b' % (place.fd, name),
                            xattrs, follow_symlinks=False)
        if self.times:
            self.stamp(name, entry, **at)

    def mode_by_path(self, place, name, entry):
        """chmod of what must not be opened; O_PATH keeps it from moving."""
        if not hasattr(os, 'O_PATH'):
            os.chmod(name, self.mode(entry), dir_fd=place.fd)
            return
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC,
                     dir_fd=place.fd)
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                os.chmod('/proc/self/fd/%d' % fd, self.mode(entry))
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
        self.patterns = Patterns(opt.exclude, opt.include, opt.operands)
        self.dresser = Dresser(opt)
        self.descent = None
        self.head = None        # raw directory part self.place stands for
        self.place = None
        self.errors = 0
        self.warned = False     # of leading '/'
        self.seen = set()       # link ids planned
        self.links = collections.OrderedDict()  # link id -> first name
        self.later = {}         # parts of left directories -> Place
        # Directories get their times as soon as no entry can be in them.
        self.ordered = record.sorted and not (opt.rename or
                                              opt.strip_components)
        self.careful = opt.keep_old or opt.keep_newer or opt.resume_extract

    def run(self):
        """Extract everything selected; the number of errors."""
        self.descent = Descent(target_open(self.opt), self.opt, self.leave)
        stream = self.fetcher.ahead(self.plan())
        try:
            for slot, member in stream:
                if member is END or not isinstance(member, Member):
                    continue        # the rest of one that failed
                self.member(slot, member, stream)
        finally:
            self.finish()
        return self.errors

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
        try:
            self.extract(slot, member, stream)
        except (EntryError, CorruptError) as e:
            message = str(e)
        except OSError as e:
            message = e.strerror or str(e)
            if e.errno in FULL:
                raise UserError('%s: %s' % (show(path_escape(member.path)),
                                            message)) from None
        except (ValueError, OverflowError) as e:
            message = str(e)
        if member.many:
            self.skip(member, stream)
        if message is not None:
            self.complain(member.path, message)
        elif self.opt.verbose:
            slash = b'/' if member.entry.kind == DIRECTORY else b''
            self.say(b'x %b%b' % (path_escape(member.path), slash))

    def skip(self, member, stream):
        """Pass over what is left of a member's extents."""
        member.lazy, member.many = True, False
        for _, extent in stream:
            if extent is END:
                return

    def say(self, line):
        say(line, b'\0' if self.opt.null_output else b'\n')

    def complain(self, path, message):
        self.errors += 1
        self.say(b'%b%b: %b' % (b'x ' if self.opt.verbose else b'',
                                path_escape(path), os.fsencode(message)))

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
        elif member.entry.size:
            yield from entry_content(self.fetcher, member.entry, member.page)

    def extract(self, slot, member, stream):
        """Make one entry; raises whatever is in the way."""
        entry, path = member.entry, member.path
        if entry.kind == DIRECTORY:
            self.directory(member)
            return
        place, name = self.locate(path)
        if self.careful and self.kept(place, name, entry):
            return
        if entry.link and entry.link in self.links \
                and self.link(place, name, member):
            return
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
        place.entry, place.xattrs = member.entry, xattrs
        place.path = member.path
        self.head, self.place = member.path, place
        # Without these bits nothing can be made in it; leave() sets all.
        mode = os.fstat(place.fd).st_mode
        if mode & 0o700 != 0o700:
            try:
                os.fchmod(place.fd, stat.S_IMODE(mode) | 0o700)
            except OSError:
                pass            # what cannot be made in it will say so

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
        except (OSError, OverflowError, ValueError) as e:
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
    live = history_live(remote, opt)
    fetcher = Fetcher(remote)
    try:
        record = archive_find(remote, live, opt.names[0], opt, fetcher)
        if opt.to_stdout:
            return extract_stdout(fetcher, record, opt)
        extractor = Extractor(fetcher, record, opt)
        extractor.run()
        return extractor.errors + unmatched(extractor.patterns) \
            + truncated(record)
    finally:
        fetcher.close()


def extract_stdout(fetcher, record, opt):
    """-x -O: the content of files, one after the other."""
    extractor = Extractor(fetcher, record, opt)
    extractor.careful = False
    stream = fetcher.ahead(extractor.plan())
    for slot, member in stream:
        if not isinstance(member, Member) or member.entry.kind != FILE:
            continue
        message = None
        try:
            for part, extent in extractor.content(slot, member, stream):
                content_write(1, part, extent)
        except CorruptError as e:
            message = str(e)
        if member.many:
            extractor.skip(member, stream)
        if message is not None:
            extractor.complain(member.path, message)
        elif opt.verbose:
            extractor.say(b'x ' + path_escape(member.path))
    return extractor.errors + unmatched(extractor.patterns) \
        + truncated(record)


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
        raise UserError('Cannot write to standard output: %s'
                        % e.strerror) from None


##############################################################################
# List: -t, -r and --list-archives
#
# What is parsed by other programs, to the byte.  Writes standard output only.
##############################################################################

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
            raise UserError('Cannot write to standard output: %s'
                            % e.strerror) from None


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
        self.patterns = Patterns(opt.exclude, opt.include, opt.operands)
        self.escape = (lambda path: path) if opt.null_output else path_escape
        self.errors = 0
        self.user_width = 6     # of the user column; only ever grows
        self.rest_width = 13    # of group and size together, likewise
        self.now = time.time()
        self.dates = {}         # minute or second -> text
        self.names = Namer()

    def run(self, fetcher, record):
        simple = not self.opt.verbose and not self.opt.newer
        for page in archive_pages(fetcher, record, self.patterns.literals(),
                                  self.bad):
            try:
                if not (self.paths(page) if simple else self.rows(page)):
                    break
            except CorruptError as e:
                self.bad(e)
            self.output.tick()
        if self.opt.verbose > 1:
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
        put, escape, opt = self.output.put, self.escape, self.opt
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
        """List a page in long lines; False to stop."""
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
            first = entry.link and self.names.name(entry, page, path)
            if self.opt.verbose:
                self.output.put(self.line(entry, path, first))
            else:
                slash = b'/' if entry.kind == DIRECTORY else b''
                self.output.put(self.escape(path) + slash)
        return True

    def line(self, entry, path, first):
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
            raise UserError('Cannot write to standard output: %s'
                            % e.strerror) from None

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
    live = history_live(remote, opt)
    fetcher = Fetcher(remote)
    try:
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
    if opt.hashes and opt.names:
        chosen = {}
        for text in opt.names:
            archive = hash_text(text)
            if archive in live:
                chosen[archive] = live[archive]
            else:
                errors.append(UserError('Archive does not exist: %s'
                                        % show(text)))
        live = chosen
    rows = []
    for archive, record in archive_records(remote, live, errors.append):
        line = list_line(archive, record, opt)
        rows.append((record.created, record.title, line))
    output = Output(1, b'\0' if opt.null_output else b'\n')
    for _, _, line in sorted(rows):
        output.put(line)
    output.flush()
    for error in errors:
        warn(str(error))
    return len(errors)


def hash_text(text):
    """The archive id a user wrote in hexadecimal; b'' if that is none."""
    try:
        return bytes.fromhex(text.decode('ascii'))
    except ValueError:
        return b''


def list_line(archive, record, opt):
    """One record of --list-archives, without its end."""
    fields = [archive.hex().encode()] if opt.hashes else []
    if opt.verbose or not fields:
        fields.append(record.title)
    if opt.verbose:
        fields.append(date_text(record.created))
    if opt.verbose > 1:
        fields.append((b'\0\0\0' if opt.null_output else b' ')
                      .join(record.argv))
    return (b'\0\0' if opt.null_output else b'\t').join(fields)


##############################################################################
# Modes that write: create, delete, fsck, nuke; statistics
#
# Each mode_*() does one mode whole and returns the exit status.  Prints what
# its users parse; decides what is retried and what is given up.
##############################################################################


def remote_open(opt, roles):
    """The Remote of the key in `opt`, proving those of `roles` it has."""
    roles = [role for role in roles if opt.key.can(role)]
    return Remote(opt.key, roles, opt.server, opt.retry_forever,
                  opt.noisy_warnings)


def roles_to_write(key):
    """To write, and to read the references of what others wrote."""
    return (ROLE_WRITE, ROLE_READ if key.can(ROLE_READ) else ROLE_DELETE)


def cache_open(opt):
    """The cache directory, locked; made if it is missing."""
    cachedir_make(opt.cachedir)
    return Cache(opt.cachedir, opt.key)


def cache_begin(opt, cache, remote, memo=None):
    """Bring a cache up to the server, or say that --fsck must."""
    remote.connect()
    if pending_exists(cache):
        pending_decide(remote, cache, memo)
    if cache.new and remote.head[0] and remote.archives:
        raise UserError('Sequence number mismatch: Run --fsck (cache '
                        'directory %s is empty, but the server has archives '
                        'of this machine)' % opt.cachedir)
    synchronize(remote, cache)
    if opt.key.can(ROLE_WRITE) and ROLE_WRITE in remote.roles:
        parts_settle(remote, cache)


def exists_error(name):
    return UserError('An archive already exists with the name "%s"'
                     % show(name))


class Create:
    """One run of -c."""

    def __init__(self, opt):
        self.opt = opt
        self.name = opt.names[0]
        self.cache = self.memo = self.txn = self.remote = None
        self.last_bytes = 0             # sent at the last checkpoint
        self.last_time = time.monotonic()

    def open(self):
        """Reach the server, catch up, begin; raises before any read."""
        opt, key = self.opt, self.opt.key
        key.need(ROLE_WRITE, '-c')
        self.cache = cache_open(opt)
        self.memo = Memo(opt.cachedir)
        self.remote = remote_open(opt, roles_to_write(opt.key))
        cache_begin(opt, self.cache, self.remote, self.memo)
        names = Names(key)
        guard = [names.archive(self.name), names.archive(self.name + b'.part')]
        if any(archive in self.cache.archives() for archive in guard):
            raise exists_error(self.name)
        self.txn = Transaction(self.remote, self.cache, guard)
        try:
            self.txn.begin()
        except Refused as e:
            if e.code == E_EXISTS:
                raise exists_error(self.name) from None
            raise

    def skip(self):
        """Directories that never go into an archive."""
        out = set()
        for path in (self.opt.cachedir, self.opt.key and
                     self.opt.key.server):
            try:
                st = os.stat(path)
                if stat.S_ISDIR(st.st_mode):
                    out.add((st.st_dev, st.st_ino))
            except (OSError, TypeError, ValueError):
                pass
        return out

    def walk(self, writer):
        return Walk(self.opt.items, self.opt, writer.report, self.skip())

    def store(self, writer):
        """Walk and commit, over again when a conflict or a server asks."""
        series = self.opt.series or series_of(self.name)
        while True:
            walk = self.walk(writer)
            try:
                writer.run(walk, self.due,
                           lambda: self.checkpoint(writer, series))
                if not writer.entries and not self.opt.quiet:
                    warn('Archive contains no files')
                self.txn.commit(
                    lambda base: writer.record(base, self.name, series),
                    COMPLETE, self.memo, writer.profile)
                return
            except Restart:
                writer.pool.drop()
                self.txn.again()
                writer.start_over()
            finally:
                walk.close()

    def due(self):
        """True if it is time for a checkpoint."""
        most, sent = self.opt.checkpoint_bytes, self.txn.sent_bytes
        return bool(most) and sent > self.last_bytes and (
            sent - self.last_bytes >= most
            or time.monotonic() - self.last_time >= CHECKPOINT_SECONDS)

    def checkpoint(self, writer, series):
        """Commit what there is as NAME.part."""
        if self.opt.verbose:
            sys.stderr.write('tarsnap: Creating checkpoint...')
        writer.finish_pages(False)
        self.txn.commit(lambda base: writer.record(
            base, self.name + b'.part', series, False), OPEN, self.memo,
            writer.profile)
        writer.checkpointed()
        if self.opt.verbose:
            sys.stderr.write(' done.\n')
        self.last_bytes = self.txn.sent_bytes
        self.last_time = time.monotonic()

    def close(self):
        for thing in (self.remote, self.txn and self.txn.pending, self.memo,
                      self.cache):
            if thing:
                thing.close()


def mode_create(opt):
    """-c: exit status 0, 1 with nothing stored, 2 stored with errors."""
    if not any(kind == 'path' for kind, _ in opt.items):
        raise UserError('No files or directories specified')
    if opt.dry_run:
        return create_dry(opt)
    run = Create(opt)
    try:
        run.open()
        writer = Writer(opt, opt.key, run.txn, run.cache, run.memo)
        writer.profile = create_profile(opt)
        try:
            run.store(writer)
        finally:
            writer.pool.close()
        if opt.print_stats:
            totals = run.cache.totals
            stats_print(sys.stderr, opt, totals, [
                ('This archive', totals[4:6]), ('New data', totals[6:8])])
        head_print(opt, run.cache)
        return 2 if writer.errors else 0
    except Refused as e:
        if e.code == E_EXISTS:
            raise exists_error(run.name) from None
        raise
    except BaseException:
        if run.txn and run.txn.changed:
            opt.changed = True
        raise
    finally:
        run.close()


def create_dry(opt):
    """-c --dry-run: everything but the server, with or without a key."""
    run = Create.__new__(Create)
    run.opt = opt
    key = opt.key or key_make('', '')
    cache = None
    if opt.key and opt.cachedir and os.path.isfile(
            os.path.join(opt.cachedir, 'directory')):
        cache = Cache(opt.cachedir, opt.key)
    memo = None
    if cache:
        memo = Memo(opt.cachedir)
    writer = Writer(opt, key, DryRun(cache), cache, memo)
    writer.profile = create_profile(opt)
    try:
        writer.run(run.walk(writer))
        record = writer.record((0, bytes(32)), b'(dry-run)', b'(dry-run)')
        writer.pool.finish()
        if opt.print_stats:
            sink = writer.sink
            whole = sink.totals(record.name)
            totals = list(cache.totals) if cache else [0] * 9
            rows = [totals[0] + whole[0], totals[1] + whole[1],
                    totals[2] + sink.new[0], totals[3] + sink.new[1]]
            stats_print(sys.stderr, opt, rows, [('This archive', whole),
                                                ('New data', sink.new)])
    finally:
        writer.pool.close()
        for thing in (memo, cache):
            if thing:
                thing.close()
    return 1 if writer.errors else 0


def create_profile(opt):
    """What pages of two runs must have in common to be candidates first."""
    digest = hashlib.sha256(FORMAT)
    for kind, value in opt.items:
        digest.update(b'%b\0%b\0' % (kind.encode(), value))
    for word in sorted(opt.exclude) + [b''] + sorted(opt.include):
        digest.update(word + b'\0')
    digest.update(repr((opt.absolute, opt.follow_all, opt.follow_operands,
                        opt.recurse, opt.store_atime)).encode())
    return digest.digest()[:8]


# Statistics.

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


def stats_print(out, opt, totals, rows):
    """The table of CLI fame: header, all archives, unique data, `rows`."""
    form = humanize if opt.humanize_numbers else str
    lines = [('', 'Total size', 'Compressed size')]
    lines += [(name, form(pair[0]), form(pair[1])) for name, pair in
              [('All archives', totals[0:2]),
               ('  (unique data)', totals[2:4])] + rows]
    for name, total, packed in lines:
        out.write('%-32s  %15s  %15s\n' % (name, total, packed))
    out.flush()


def head_print(opt, cache):
    """--print-head: what --expect-head takes on a bare machine."""
    if opt.print_head:
        sys.stdout.write(head_text((cache.n, cache.head)) + '\n')
        sys.stdout.flush()


def release(cache, records):
    """What ceases to exist when `records` are unlinked.

    ([names, parents first], plain, stored).  Blocks that nothing refers to
    any more, from earlier runs, go too but are not counted.  The names hold
    every existing parent of each of them.
    """
    counts, dead, sums = {}, [], [0, 0]
    with cache.lock:
        garbage = [row[0] for row in cache.db.execute(
            'SELECT name FROM blocks WHERE count = 0')]
    for stack, wanted in ((garbage, False), (list(records), True)):
        while stack:
            name = stack.pop()
            dead.append(name)
            row = cache.find(name)
            if row is None:
                raise UserError('Directory is not consistent with archive: '
                                'Run --fsck')
            if wanted:
                sums[0] += row[2] or 0
                sums[1] += row[3]
            stack += release_kids(cache, name, counts)
    return dead, sums[0], sums[1]


def release_kids(cache, name, counts):
    """Count one parent less for the kids of `name`; those left with none."""
    out = []
    for kid in {kid.name for kid in cache.kids(name) or ()}:
        if kid not in counts:
            below = cache.find(kid)
            counts[kid] = below[1] if below else 0
        counts[kid] -= 1
        if counts[kid] == 0:
            out.append(kid)
    return out


def release_check(cache, dead):
    """UserError unless every parent of each of `dead` is among them.

    Counts decide what is deleted; this scan of all references is what a
    count that is wrong, for whatever reason, must get past.
    """
    gone = set(dead)
    with cache.lock:
        for name, kids in cache.db.execute(
                'SELECT name, kids FROM blocks WHERE kids IS NOT NULL'):
            if name not in gone and any(
                    kid[1] in gone for kid in KID.iter_unpack(kids)):
                raise inconsistent()


def archive_missing(name):
    return UserError('Archive does not exist: %s' % show(name))


def mode_delete(opt):
    """-d: one transaction for each name; exit status 0, 1, or 2 when some
    were deleted before a failure.
    """
    opt.key.need(ROLE_DELETE, '-d')
    cache = cache_open(opt)
    remote = remote_open(opt, (ROLE_DELETE, ROLE_READ, ROLE_WRITE))
    status = 0
    try:
        cache_begin(opt, cache, remote)
        if cache.partial:
            raise UserError('Directory is not consistent with archive: Run '
                            '--fsck (blocks of other hosts could not be '
                            'read)')
        for name in opt.names:
            if opt.verbose:
                sys.stderr.write('Deleting archive "%s"\n' % show(name))
            try:
                freed = delete_archive(remote, cache, name)
            except UserError as e:
                if not opt.keep_going or not str(e).startswith('Archive does'):
                    raise
                warn(str(e))
                continue
            opt.changed = True
            if opt.print_stats:
                title = 'This archive' if len(opt.names) == 1 else show(name)
                stats_print(sys.stderr, opt, cache.totals, [
                    (title, freed[0]), ('Deleted data', freed[1])])
        head_print(opt, cache)
    finally:
        remote.close()
        cache.close()
    return status


def delete_archive(remote, cache, name):
    """Delete one archive; ((total, stored) of it, (plain, stored) freed).

    Durable on return.  A conflict or a lost connection recomputes the whole
    set on the newest base; if the lost commit was ours, that shows there.
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
        row = cache.archives().get(archive)
        if row is None:
            raise archive_missing(name)
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
    all_dead = [cache.find(name) for name in dead]
    totals[2] -= sum(row[2] or 0 for row in all_dead)
    totals[3] -= sum(row[3] for row in all_dead)
    archives = cache.archives()
    del archives[archive]
    totals[4:] = (*whole, plain, stored, len(archives))
    commit = Commit(cache.key.machine, cache.n + 1, cache.head, KIND_DELETE,
                    os.urandom(16))
    commit.unlinked.append((archive, record))
    commit.deleted = counted(sorted(dead))
    commit.live = live_digest(archives)
    commit.note = note_seal(cache.key, commit.n, [max(0, n) for n in totals])
    raw = commit_pack(commit, cache.key)
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


def delete_send(remote, cache, commit, dead, raw):
    """BEGIN, the names, COMMIT."""
    channel = remote.connect()
    transaction_open(channel, KIND_DELETE, commit.tid, bytes(16),
                     (cache.n, cache.head))
    for start in range(0, len(dead), CEILING['names']):
        channel.push(DELETE, names_join(dead[start:start + CEILING['names']]))
    transaction_commit(channel, raw)


def mode_print_stats(opt):
    """--print-stats as a mode: from the cache directory alone."""
    if opt.names:
        opt.key.need(ROLE_READ, '--print-stats -f')
    cache = Cache(opt.cachedir, opt.key, lock=False)
    status = 0
    try:
        if cache.new:
            raise UserError('Error reading cache directory %s: it is empty; '
                            '--fsck fills it' % opt.cachedir)
        names = Names(opt.key)
        rows = []
        for name in opt.names:
            row = cache.archives().get(names.archive(name))
            if row is None:
                if not opt.keep_going:
                    raise archive_missing(name)
                warn(str(archive_missing(name)))
                continue
            rows.append((show(name), cache.total(row[0])))
            rows.append(('  (unique data)', release_own(cache, row[0])))
        stats_print(sys.stdout, opt, cache.totals, rows)
    finally:
        cache.close()
    return status


def release_own(cache, record):
    """(plain, stored) bytes that exist only for this archive."""
    return release(cache, [record])[1:]


def mode_initialize(opt):
    """--initialize-cachedir: an empty cache directory."""
    if os.path.exists(os.path.join(opt.cachedir, 'directory')):
        raise UserError('Cache directory %s is in use already; --fsck '
                        'rebuilds it' % opt.cachedir)
    cachedir_make(opt.cachedir)
    os.close(cachedir_lock(opt.cachedir))
    return 0


def mode_recover(opt):
    """--recover: what a dead run left becomes NAME.part."""
    if not opt.key.can(ROLE_WRITE):
        opt.key.need(ROLE_DELETE, '--recover')
        return 0            # a delete settles what is undecided by itself
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


def mode_fsck(opt):
    """--fsck: make the cache directory anew from the signed history."""
    key = opt.key
    if not key.can(ROLE_WRITE) and not key.can(ROLE_DELETE):
        key.need(ROLE_WRITE, '--fsck')
    cachedir_make(opt.cachedir)
    lock = cachedir_lock(opt.cachedir)
    try:
        remote = remote_open(opt, (ROLE_WRITE, ROLE_READ, ROLE_DELETE))
        try:
            fsck_run(opt, remote)
        except CorruptError as e:
            warn(str(e))
            raise UserError('Error fscking archives') from None
        finally:
            remote.close()
    finally:
        os.close(lock)
    return 0


def phase(text):
    sys.stdout.write(text + '\n')
    sys.stdout.flush()


def fsck_run(opt, remote):
    """The five phases, as programs that show progress expect them."""
    phase('Phase 1: Verifying the signed history')
    remote.connect()
    fsck_seen(opt, remote)
    for name in ('pending', 'pending-journal', 'cache', 'cache-journal',
                 'directory', 'directory-journal'):
        try:
            os.unlink(os.path.join(opt.cachedir, name))
        except FileNotFoundError:
            pass
    cache = Cache(opt.cachedir, opt.key, lock=False)
    try:
        cache.catch_up(history_changes(remote, (0, opt.key.genesis())))
        phase('Phase 2: Verifying the list of archives')
        live = cache.archives()
        phase('Phase 3: Reading the index')
        if opt.key.refs_priv:
            read_missing(remote, cache)
        phase('Phase 4: Verifying archives are complete')
        for number, row in enumerate(live.values(), 1):
            phase('  Archive %d/%d...' % (number, len(live)))
            if not cache.partial:
                cache.total(row[0])
        if opt.key.can(ROLE_READ):
            small_rebuild(remote, cache)
        phase('Phase 5: Identifying unreferenced chunks')
        if not cache.partial:
            cache.totals_make()
        with cache.lock:
            cache.db.execute('BEGIN IMMEDIATE')
            cache.save()
            cache.db.execute('COMMIT')
        cache.publish()
    finally:
        cache.close()


def small_rebuild(remote, cache):
    """Enter where the content of each small file is, from the rows of every
    page; without it all small files would be sent again.
    """
    with cache.lock:
        kids = [Kid(INDEX, *row) for row in cache.db.execute(
            "SELECT name, plain FROM blocks WHERE cls = 'i' AND plain")]
    fetcher = Fetcher(remote)
    try:
        with cache.lock:
            cache.db.execute('BEGIN IMMEDIATE')
            for slot, _ in fetcher.ahead((kid, False, None) for kid in kids):
                block = slot.get()
                if block.kind == PAGE:
                    cache.db.executemany(
                        'INSERT OR IGNORE INTO small VALUES(?, ?)',
                        page_smalls(block))
            cache.db.execute('COMMIT')
    finally:
        fetcher.close()


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


def mode_nuke(opt):
    """--nuke: everything of this machine, after a sentence typed by hand."""
    opt.key.need(ROLE_NUKE, '--nuke')
    sys.stderr.write('This deletes all archives of this machine.\nPlease '
                     'type \'No Tomorrow\' to continue\n')
    sys.stderr.flush()
    if sys.stdin is None or sys.stdin.readline() != 'No Tomorrow\n':
        raise UserError('You didn\'t type \'No Tomorrow\'; nothing was '
                        'deleted')
    remote = remote_open(opt, (ROLE_NUKE,))
    try:
        while True:
            channel = remote.connect()
            n, head = remote.head
            commit = Commit(opt.key.machine, n + 1, head, KIND_NUKE,
                            os.urandom(16))
            commit.deleted = (EVERYTHING, bytes(32))
            raw = commit_pack(commit, opt.key)
            try:
                channel.call(NUKE, raw)
                return 0
            except ChannelLost:
                remote.connect()
                if remote.head == (n + 1, sha256(raw)):
                    return 0
            except Refused as e:
                if e.code != E_CONFLICT:
                    raise
                remote.close()
    finally:
        remote.close()


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
        sys.stdout.write(head_text(remote.head) + '\n')
    finally:
        remote.close()
    return 0


def mode_read(opt):
    """-t, -x, -r and --list-archives: nothing but errors to decide here."""
    if not (opt.mode == '--list-archives' and opt.key.can(ROLE_DELETE)):
        opt.key.need(ROLE_READ, opt.mode)
    remote = remote_open(opt, (ROLE_READ,) if opt.key.can(ROLE_READ)
                         else (ROLE_DELETE,))
    run = {'-t': mode_list, '-x': mode_extract, '-r': mode_tar,
           '--list-archives': mode_list_archives}[opt.mode]
    try:
        return 1 if run(remote, opt) else 0
    finally:
        remote.close()


##############################################################################
# Options
#
# One table, from which come parsing, the configuration file and --help.  The
# command line is tar's: bundles, prefixes, an end at the first operand; see
# tarsnap(1).  Decides nothing but what was asked.
##############################################################################


class Option:
    """One row: how it is written, where it is allowed, what it sets."""

    __slots__ = ('name', 'letter', 'arg', 'modes', 'conf', 'kind', 'text')

    def __init__(self, name, letter, arg, modes, conf, kind, text):
        self.name = name            # long name without dashes
        self.letter = letter        # short letter or ''
        self.arg = arg              # name of its argument, '' for a flag
        self.modes = modes          # letters of MODES; '' is all of them
        self.conf = conf            # may stand in a configuration file
        self.kind = kind            # how it is stored: see option_store
        self.text = text            # a line for --help


# Mode letters: c d t x r as such, a --list-archives, s --print-stats,
# f --fsck, i --initialize-cachedir, n --nuke, R --recover, h --print-head.
MODES = [
    # long name, letter, mode letter, text
    ('create', 'c', 'c', 'create an archive'),
    ('delete', 'd', 'd', 'delete archives'),
    ('list', 't', 't', 'list the contents of an archive'),
    ('extract', 'x', 'x', 'extract from an archive'),
    ('tar', 'r', 'r', 'write an archive to standard output as a tar stream'),
    ('list-archives', '', 'a', 'list the archives'),
    ('print-stats', '', 's', 'print statistics (also with -c and -d)'),
    ('recover', '', 'R', 'settle what an interrupted run left'),
    ('fsck', '', 'f', 'rebuild the cache directory'),
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
    ('file', 'f', 'NAME', 'cdtxrs', False, 'names', 'name of the archive'),
    ('keyfile', '', 'FILE', '', True, 'path', 'key file to use'),
    ('cachedir', '', 'DIR', '', True, 'path', 'cache directory'),
    ('server', '', 'ADDRESS', '', True, 'text',
     'another address of the key\'s server; the pin stays'),
    ('configfile', '', 'FILE', '', False, 'configs',
     'read this configuration file too'),
    ('no-default-config', '', '', '', False, 'flag',
     'do not read the default configuration files'),
    ('cd', 'C', 'DIR', 'ctx', False, 'cd', 'change to this directory'),
    ('verbose', 'v', '', '', False, 'count', 'say more; may be repeated'),
    ('quiet', '', '', '', True, 'switch', 'no warnings about common things'),
    ('exclude', '', 'PATTERN', 'ctx', True, 'list', 'leave out what matches'),
    ('include', '', 'PATTERN', 'ctx', True, 'list', 'only what matches'),
    ('norecurse', 'n', '', 'c', False, 'flag', 'do not descend'),
    ('one-file-system', '', '', 'c', False, 'flag',
     'stay on the file system of each operand'),
    ('follow-operands', 'H', '', 'c', False, 'follow-H',
     'follow symbolic links among the operands'),
    ('dereference', 'L', '', 'c', False, 'follow-L',
     'follow all symbolic links'),
    ('insane-filesystems', '', '', 'c', True, 'switch',
     'descend into proc, sysfs and the like'),
    ('store-atime', '', '', 'c', True, 'switch', 'store access times'),
    ('absolute-paths', 'P', '', 'ctx', False, 'flag',
     'keep leading slashes; lift the guards of -x'),
    ('creationtime', '', 'UNIX', 'c', False, 'integer',
     'creation time of the archive'),
    ('series', '', 'SERIES', 'c', False, 'bytes',
     'series the archive belongs to'),
    ('dry-run', '', '', 'c', False, 'flag', 'only pretend'),
    ('print-stats', '', '', '', True, 'switch', 'print statistics'),
    ('humanize-numbers', '', '', '', True, 'switch', 'use kB, MB, ...'),
    ('checkpoint-bytes', '', 'SIZE', 'c', True, 'checkpoint',
     'checkpoint each SIZE bytes of upload (0: never)'),
    ('no-pad', '', '', 'c', True, 'flag', 'do not hide the sizes of blocks'),
    ('verify-encode', '', '', 'c', True, 'flag',
     'open every block again before it is sent'),
    ('strip-components', '', 'N', 'tx', False, 'integer',
     'drop leading elements of paths'),
    ('iso-dates', '', '', '', True, 'switch', 'dates as YYYY-MM-DD'),
    ('numeric-owner', '', '', '', False, 'flag', 'numbers, not names'),
    ('preserve-permissions', 'p', '', 'x', False, 'flag',
     'restore modes, ACLs and attributes exactly (default for root)'),
    ('no-owner', 'o', '', 'x', False, 'flag', 'do not restore owners'),
    ('keep-old-files', 'k', '', 'x', False, 'flag', 'never overwrite'),
    ('keep-newer-files', '', '', 'x', False, 'flag',
     'do not replace newer files'),
    ('resume-extract', '', '', 'x', False, 'flag',
     'skip files that have the right size and time'),
    ('modification-time', 'm', '', 'x', False, 'flag',
     'do not restore modification times'),
    ('to-stdout', 'O', '', 'tx', False, 'flag', 'write to standard output'),
    ('fast-read', 'q', '', 'tx', False, 'flag',
     'stop when each operand was found'),
    ('sparse', 'S', '', 'x', False, 'flag', 'make runs of zeros holes'),
    ('unlink-first', 'U', '', 'x', False, 'flag', 'unlink files first'),
    ('chroot', '', '', 'x', False, 'flag', 'chroot to the target first'),
    ('keep-going', '', '', '', False, 'flag', 'go on after a missing archive'),
    ('hashes', '', '', '', False, 'flag', 'list archive ids'),
    ('null-output', '', '', 'atx', False, 'flag', 'NUL ends each record'),
    ('passphrase', '', 'METHOD:ARG', '', True, 'text',
     'where the passphrase comes from'),
    ('force-resources', '', '', '', True, 'switch',
     'open key files however costly that is'),
    ('retry-forever', '', '', '', True, 'switch', 'never stop reconnecting'),
    ('noisy-warnings', '', '', '', False, 'flag',
     'warn about every network problem'),
    ('expect-head', '', 'N:HEX16', 'txra', False, 'text',
     'refuse a server whose state is older or another'),
    ('accept-rollback', '', '', 'f', False, 'flag',
     'believe a server that really lost commits'),
    ('version', '', '', '', False, 'flag', 'print the version'),
    ('help', '', '', '', False, 'flag', 'print this'),
)]

ALIASES = {
    'insecure': 'absolute-paths', 'directory': 'cd',
    'no-recursion': 'norecurse', 'same-permissions': 'preserve-permissions',
    'unlink': 'unlink-first',
}

SIZE_TEXT = re.compile(r'([0-9]{1,19}) ?([kMGTPE]?)B?')


class Usage(UserError):
    """The command line is wrong; the short usage follows."""


def size_parse(text):
    """Bytes in `12`, `5k`, `1 GB`: decimal powers; UserError otherwise."""
    found = SIZE_TEXT.fullmatch(text)
    if not found:
        raise UserError('Not a size: %s' % text)
    return int(found[1]) * 1000 ** (' kMGTPE'.index(found[2] or ' '))


class Settings:
    """What was asked, by name; every field stands here with its default."""

    def __init__(self):
        self.mode = None            # -c, --list-archives, ...
        self.letter = None          # of the mode
        self.argv = []              # the command line, bytes
        self.names = []             # -f, bytes
        self.items = []             # ('cd' | 'path', bytes) in order
        self.operands = []          # the paths among them
        self.directories = []       # the directories among them
        self.include, self.exclude = [], []
        self.configs = []
        self.verbose = 0
        self.follow_operands = self.follow_all = False
        self.set_by = {}            # option -> 'command line' or file
        self.key = None             # Key, once loaded
        self.changed = False        # the server's state, by this run
        self.patterns = None        # Patterns, if there are any
        for option in OPTIONS:
            field = option.name.replace('-', '_')
            if not hasattr(self, field):
                setattr(self, field, None if option.arg else False)
        self.print_head = self.lone_h = False
        self.newer = self.rename = None
        self.checkpoint_bytes = CHECKPOINT_BYTES
        self.passphrase = 'dev:tty-stdin'
        self.strip_components = 0

    def finish(self):
        """Fields under the names the sections use."""
        self.recurse = not self.norecurse
        self.absolute = self.absolute_paths
        self.pad = not self.no_pad
        self.keep_old = self.keep_old_files
        self.keep_newer = self.keep_newer_files
        self.no_mtime = self.modification_time
        self.perms = self.preserve_permissions or os.geteuid() == 0
        self.sparse_out = self.sparse
        self.operands = [value for kind, value in self.items
                         if kind == 'path']
        self.directories = [value for kind, value in self.items
                            if kind == 'cd']
        if self.include or self.exclude:
            self.patterns = Patterns(self.exclude, self.include)


class Parser:
    """Reads a command line into Settings.

    Immediate options act at once; those that may also stand in a
    configuration file wait until the mode is known.
    """

    def __init__(self, argv):
        self.words = list(argv)
        self.opt = Settings()
        self.delayed = []           # (Option, value, name as written)
        self.longs = {row[0]: row for row in MODES
                      if row[0] not in ('print-stats', 'print-head', 'tar')}
        self.letters = {row[1]: row for row in MODES if row[1]}
        for option in OPTIONS:
            self.longs[option.name] = option
            if option.letter:
                self.letters[option.letter] = option
            if option.kind == 'switch' and option.name != 'print-stats':
                self.longs['no-' + option.name] = option
        self.longs['no-print-stats'] = self.longs['print-stats']
        self.longs['print-head'] = MODES[-2]
        for alias, name in ALIASES.items():
            self.longs[alias] = self.longs[name]

    def parse(self):
        """The Settings of the whole line."""
        self.bundle_old()
        while self.words:
            word = self.words.pop(0)
            if word == '--':
                break
            if word.startswith('--'):
                self.long(word[2:])
            elif word.startswith('-') and len(word) > 1:
                self.short(word[1:])
            else:
                self.words.insert(0, word)
                break
        self.operands()
        self.mode_settle()
        for option, value, name in self.delayed:
            self.store(option, value, name, 'command line')
        return self.opt

    def bundle_old(self):
        """`cvf NAME`: letters without a dash, arguments in their order."""
        if not self.words or self.words[0].startswith('-') \
                or not self.words[0]:
            return
        letters = self.words.pop(0)
        for letter in letters:
            row = self.letters.get(letter)
            if row is None:
                raise Usage('Unknown option: %s' % letter)
            self.take(row, letter, '-' + letter, None)

    def short(self, text):
        """A bundle of letters; the first that takes an argument has the
        rest, or the next word.
        """
        while text:
            letter, text = text[0], text[1:]
            if letter == 'h':
                self.take_h()
                continue
            row = self.letters.get(letter)
            if row is None:
                raise Usage('Unknown option: -%s' % letter)
            attached = None
            if isinstance(row, Option) and row.arg and text:
                attached, text = text, ''
            self.take(row, letter, '-' + letter, attached)

    def take_h(self):
        """-h is -L with a mode, --help alone."""
        self.opt.follow_all, self.opt.follow_operands = True, False
        self.opt.lone_h = True

    def long(self, text):
        """`name`, `name=value` or an unambiguous prefix of a name."""
        name, equals, value = text.partition('=')
        row = self.longs.get(name)
        if row is None:
            near = sorted(n for n in self.longs if n.startswith(name))
            rows = {id(self.longs[n]): n for n in near}
            if not near:
                raise Usage('Unknown option: --%s' % name)
            if len(rows) > 1:
                raise Usage('Ambiguous option: --%s (%s)'
                            % (name, ', '.join('--' + n for n in near)))
            name = near[0]
            row = self.longs[name]
        if equals and not (isinstance(row, Option) and row.arg):
            raise Usage('Option --%s takes no argument' % name)
        self.take(row, name, '--' + name, value if equals else None)

    def take(self, row, name, written, value):
        """One option with its argument, acted on or queued."""
        if not isinstance(row, Option):
            self.mode_take(row, written)
            return
        if row.arg and value is None:
            if not self.words:
                raise Usage('Option %s needs an argument' % written)
            value = self.words.pop(0)
        if row.conf and row.name != 'print-stats':
            self.delayed.append((row, value, name))
        else:
            self.store(row, value, name, None)

    def mode_take(self, row, written):
        if row[0] == 'print-head':
            self.opt.print_head = True
        elif self.opt.letter and self.opt.letter != row[2]:
            raise Usage('Mode %s given twice: also %s'
                        % (MODE_WORDS[self.opt.letter], written))
        else:
            self.opt.letter = row[2]

    def store(self, option, value, name, source):
        """Set one option; `source` for those that may only be set once."""
        opt, field = self.opt, option.name.replace('-', '_')
        if source and option.kind not in ('list',):
            if field in opt.set_by:
                if source == 'command line':
                    raise Usage('Option --%s given twice' % name)
                return
            opt.set_by[field] = source
        off = name.startswith('no-') and option.kind == 'switch'
        option_store(opt, option, field, value, off)

    def operands(self):
        """What follows the options; in mode c, -C may stand among it."""
        words, opt = self.words, self.opt
        while words:
            word = words.pop(0)
            if opt.letter == 'c' and word.startswith('-C'):
                value = word[2:]
                if not value:
                    if not words:
                        raise Usage('Option -C needs an argument')
                    value = words.pop(0)
                opt.items.append(('cd', os.fsencode(value)))
                continue
            if opt.letter == 'c' and word.startswith('--'):
                warn('"%s" after the first operand is taken as a path' % word)
            if not word:
                raise Usage('Empty operand')
            opt.items.append(('path', os.fsencode(word)))

    def mode_settle(self):
        """The mode, once everything was seen."""
        opt = self.opt
        if opt.help or opt.version:
            return
        if opt.letter is None and opt.lone_h:
            opt.help = True
            return
        if opt.letter is None and opt.print_stats:
            opt.letter = 's'
        if opt.letter is None and opt.print_head:
            opt.letter = 'h'
        if opt.letter is None:
            raise Usage('Must specify one of -c, -d, -r, -t, -x, '
                        '--list-archives, --print-stats, --fsck, --nuke')
        opt.mode = MODE_WORDS[opt.letter]
        for option in OPTIONS:
            used = any(row[0] is option for row in self.delayed) or (
                option.arg and not option.conf
                and getattr(opt, option.name.replace('-', '_'), None))
            if used and option.modes and opt.letter not in option.modes:
                raise Usage('Option --%s is not permitted in mode %s'
                            % (option.name, opt.mode))

    # Configuration files.

    def config_defaults(self):
        """Read the configuration files, the most important first."""
        for path in self.opt.configs:
            self.config_read(path, True)
        if self.opt.no_default_config:
            return
        import pwd
        home = pwd.getpwuid(os.geteuid()).pw_dir
        xdg = os.environ.get('XDG_CONFIG_HOME') or os.path.join(home,
                                                                '.config')
        for path in (os.path.join(home, '.tarsnaprc'),
                     os.path.join(xdg, 'tarsnap', 'tarsnap.conf'),
                     '/usr/local/etc/tarsnap.conf', '/etc/tarsnap.conf'):
            self.config_read(path, False)

    def config_read(self, path, must):
        """One file: a directive a line, the first setting wins."""
        try:
            with open(path, 'rb') as file:
                text = file.read(KEY_LONGEST)
        except OSError as e:
            if must or e.errno not in (errno.ENOENT, errno.ENOTDIR,
                                       errno.EACCES):
                raise UserError('Cannot read configuration file %s: %s'
                                % (path, e.strerror)) from None
            return
        lines = text.replace(b'\r\n', b'\n').replace(b'\r', b'\n')
        for number, line in enumerate(lines.split(b'\n'), 1):
            line = os.fsdecode(line).lstrip(' \t')
            if line and not line.startswith('#'):
                self.directive(line, '%s:%d' % (path, number))

    def directive(self, line, where):
        """One line of a configuration file; `where` is FILE:LINE."""
        name, _, value = line.partition(' ')
        if '\t' in name:
            name, _, value = line.partition('\t')
        value = value.lstrip(' \t')
        option = self.longs.get(name)
        if not isinstance(option, Option) or not option.conf \
                or name in ALIASES:
            raise UserError('%s: unknown directive: %s' % (where, name))
        if option.arg and not value:
            raise UserError('%s: %s needs an argument' % (where, name))
        if option.arg and value != value.rstrip():
            warn('%s: blanks at the end of the line are part of the argument'
                 % where)
        if not option.arg and value.strip():
            raise UserError('%s: %s takes no argument' % (where, name))
        if option.modes and self.opt.letter not in option.modes:
            return
        if name in ('print-stats', 'no-print-stats') and (
                self.opt.letter not in 'cd' or self.opt.print_stats):
            return
        if value.startswith('~'):
            import pwd
            value = pwd.getpwuid(os.geteuid()).pw_dir + value[1:]
        try:
            self.store(option, value, name, where)
        except UserError as e:
            raise UserError('%s: %s' % (where, e)) from None


def option_store(opt, option, field, value, off):
    """Put a value where its kind says."""
    kind = option.kind
    if kind == 'names':
        name = os.fsencode(value)
        if not 0 < len(name) <= 1023:
            raise UserError('Archive name must have 1 to 1023 bytes')
        opt.names.append(name)
    elif kind == 'configs':
        opt.configs.append(value)
    elif kind == 'list':
        getattr(opt, field).append(os.fsencode(value))
    elif kind == 'cd':
        if not value:
            raise Usage('Empty directory for -C')
        opt.items.append(('cd', os.fsencode(value)))
    elif kind == 'count':
        opt.verbose += 1
    elif kind in ('follow-H', 'follow-L'):
        opt.follow_all = kind == 'follow-L'
        opt.follow_operands = kind == 'follow-H'
    elif kind == 'switch':
        # Asking for statistics beats asking for none.
        setattr(opt, field, not off or (field == 'print_stats'
                                        and opt.print_stats))
    elif kind == 'flag':
        setattr(opt, field, True)
    elif kind == 'checkpoint':
        opt.checkpoint_bytes = size_parse(value)
        if 0 < opt.checkpoint_bytes < 1000000:
            raise UserError('--checkpoint-bytes must be at least 1000000')
    elif kind == 'integer':
        try:
            setattr(opt, field, int(value, 0))
        except ValueError:
            raise UserError('--%s wants a number, not "%s"'
                            % (option.name, value)) from None
    elif kind == 'bytes':
        setattr(opt, field, os.fsencode(value))
    else:
        setattr(opt, field, value)


USAGE = """\
usage: tarsnap -c [options] -f NAME [-C DIR] PATH ...
       tarsnap {-t | -x} [options] -f NAME [PATTERN ...]
       tarsnap {-d | -r} [options] -f NAME
       tarsnap {--list-archives | --print-stats | --fsck | --nuke} [options]
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
            '--' + ('[no-]' if option.kind == 'switch' else '') + option.name]
        lines.append('  %-28s %s' % (', '.join(words) + (
            ' ' + option.arg if option.arg else ''), option.text))
    lines.append('\ntarsnap %s' % VERSION)
    sys.stdout.write('\n'.join(lines) + '\n')


##############################################################################
# Main
##############################################################################

NEEDS_CACHE = 'cdsfiR'
RUN = {'c': mode_create, 'd': mode_delete, 't': mode_read, 'x': mode_read,
       'r': mode_read, 'a': mode_read, 's': mode_print_stats,
       'f': mode_fsck, 'i': mode_initialize, 'n': mode_nuke,
       'R': mode_recover, 'h': mode_print_head}
FAILED = {'c': 'Error creating archive', 'd': 'Error deleting archive',
          't': 'Error reading archive', 'x': 'Error extracting archive',
          'r': 'Error reading archive', 'a': 'Error listing archives',
          's': 'Error generating archive statistics',
          'n': 'Error nuking archives'}


def settings_check(opt):
    """What must hold before the key is opened; in the contract's order."""
    letter = opt.letter
    if letter == 'c' and opt.dry_run and not opt.names:
        opt.names = [b'(dry-run)']
    if letter in 'cdtxr' and not opt.names:
        raise UserError('Archive name must be specified')
    if letter in 'ctxr' and len(opt.names) > 1:
        raise UserError('Mode %s takes one archive name' % opt.mode)
    if letter in NEEDS_CACHE and not opt.cachedir \
            and not (letter == 'c' and opt.dry_run):
        raise UserError('Cache directory must be specified for %s (--cachedir'
                        ' or cachedir in tarsnap.conf)' % opt.mode)
    if letter in 's' and not os.path.exists(
            os.path.join(opt.cachedir, 'directory')):
        raise UserError('Error reading cache directory %s: it is empty; '
                        '--fsck fills it' % opt.cachedir)
    if letter not in 'ctx' and opt.items:
        raise UserError('Mode %s takes no operands: %s' % (
            opt.mode, show(opt.items[0][1])))
    if letter == 'r':
        opt.names = opt.names[:1]


def key_open(opt):
    """Load the key file of `opt`, asking for its passphrase if it has one."""
    if not opt.keyfile:
        if opt.letter == 'c' and opt.dry_run:
            return None
        raise UserError('Key file must be specified (--keyfile or keyfile in '
                        'tarsnap.conf)')
    if opt.letter == 'c' and opt.dry_run and not os.path.exists(opt.keyfile) \
            and opt.set_by.get('keyfile') != 'command line':
        return None
    return key_load(opt.keyfile, ask_passphrase(opt.passphrase),
                    opt.force_resources)


def run(argv):
    """Parse and do; the exit status.  Raises Error."""
    parser = Parser(argv[1:])
    opt = parser.parse()
    if opt.version:
        sys.stdout.write('tarsnap %s\n' % VERSION)
        return 0
    if opt.help:
        help_print()
        return 0
    parser.config_defaults()
    opt.argv = [os.fsencode(word) for word in argv]
    opt.finish()
    if opt.letter == 'v':
        return 0
    settings_check(opt)
    opt.key = key_open(opt)
    try:
        return RUN[opt.letter](opt)
    except BrokenPipeError:
        raise
    except Exception as e:
        warn(failure_text(e, opt))
        if opt.letter in FAILED:
            warn(FAILED[opt.letter])
        return 2 if opt.changed else 1


def failure_text(error, opt):
    """The line that says what ended a mode; a bug is raised again."""
    if isinstance(error, Error):
        return str(error)
    if isinstance(error, OSError):
        return system_text(error)
    if type(error).__module__ == 'sqlite3':     # imported only where needed
        return 'Error reading cache directory %s: %s (if it is damaged, run ' \
            '--fsck)' % (opt.cachedir, error)
    raise error


def system_text(error):
    """What the system refused, and of what if it says."""
    name = '' if error.filename is None else show(error.filename) + ': '
    return name + (error.strerror or str(error))


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


def output_end():
    """Drop what standard output could not take, or the interpreter would
    complain of it once more.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main(argv=None):
    """The command `tarsnap`; exits with its status."""
    argv = sys.argv if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors='surrogateescape')
    try:
        limits_set()
        status = run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except Usage as e:
        warn(str(e))
        sys.stderr.write(USAGE)
        status = 1
    except Error as e:
        warn(str(e))
        status = 1
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
    if status:
        warn('Error exit delayed from previous errors.')
    sys.exit(status)


if __name__ == '__main__':
    main()
