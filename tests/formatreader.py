# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A second reader of key files, blocks, records and commits.

Written from tarsnap-format(5) alone and sharing no line with the programs: if
the page is wrong, this reader fails on what the programs write.  Slow and
short; every check the page asks of a reader is made.
"""

import base64
import hashlib
import hmac
import zlib

from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HOLE = 4294967295
MOST_PART = 262144


class Damaged(Exception):
    """The bytes are not what the page says they must be."""


def need(condition, what):
    if not condition:
        raise Damaged(what)


class Fields:
    """Takes fields off the front of a byte string."""

    def __init__(self, data):
        self.data = data

    def bytes(self, length):
        need(len(self.data) >= length, 'cut short')
        out, self.data = self.data[:length], self.data[length:]
        return out

    def number(self, bits, signed=False):
        return int.from_bytes(self.bytes(bits // 8), 'big', signed=signed)


def mac(key, message):
    return hmac.new(key, message, hashlib.sha256).digest()


def sha(data):
    return hashlib.sha256(data).digest()


# KEY FILES

def key_fields(text):
    """Tag -> data of the key file `text` (str, without a passphrase)."""
    lines = text.split('\n')
    start = lines.index('# START OF TARSNAP KEY FILE')
    end = lines.index('# END OF TARSNAP KEY FILE')
    content = Fields(base64.b64decode(''.join(lines[start + 1:end])))
    need(content.bytes(12) == b'tarsnap-key\0', 'magic')
    need(content.number(8) == 1, 'version')
    need(content.bytes(32) == sha(content.data), 'checksum')
    fields = {}
    while content.data:
        tag = content.number(8)
        fields[tag] = content.bytes(content.number(16))
    return fields


def key_fingerprint(key):
    return sha(key[6] + key[7] + key[8])


# NAMES

def name_chunk(key, data):
    return mac(key[20], b'c' + data)


def name_rows(key, rows):
    return mac(key[20], b'r' + rows)


def name_index(key, refs):
    return mac(key[21], b'p' + refs)


def name_record(key, refs):
    return mac(key[21], b'a' + refs)


def archive_id(key, title):
    return mac(key[21], b'n' + title)


def series_tag(key, series):
    return mac(key[21], b's' + series)[:16]


# SEALED BLOCKS

PARTS = {b'c': [1], b'i': [2, 1], b'a': [2, 2, 1]}


def block_open(key, cls, name, block):
    """The plain parts of a sealed block; its name is for the caller."""
    need(len(block) <= (294912 if cls == b'c' else 1048576), 'too long')
    fields = Fields(block)
    need(fields.number(8) == 1, 'suite')
    need(fields.bytes(1) == cls, 'class')
    need(fields.number(8) == len(PARTS[cls]), 'number of parts')
    epk = fields.bytes(32)
    out = []
    for part, recipient in enumerate(PARTS[cls]):
        need(fields.number(8) == recipient, 'recipient')
        text = Fields(fields.bytes(fields.number(32)))
        nonce = text.bytes(12)
        private, public, mix = {1: (key[16], key[7], key[18]),
                                2: (key[17], key[8], key[19])}[recipient]
        exchanged = x25519.X25519PrivateKey.from_private_bytes(
            private).exchange(x25519.X25519PublicKey.from_public_bytes(epk))
        extracted = mac(epk, exchanged + mix)
        secret = mac(extracted, b'tarsnap-seal-1' + bytes([1, recipient])
                     + public + b'\x01')
        part_key = mac(secret, cls + bytes([part]) + name)
        aad = b'\x01' + cls + bytes([part]) + name + key[1]
        out.append(unframe(AESGCM(part_key).decrypt(nonce, text.data, aad)))
    need(not fields.data, 'bytes after the last part')
    return out


def unframe(plain):
    fields = Fields(plain)
    codec = fields.number(8)
    length, packed = fields.number(32), fields.number(32)
    need(length <= MOST_PART and packed <= MOST_PART, 'part too long')
    data = fields.bytes(packed)
    need(not fields.data.strip(b'\0'), 'padding')
    need(len(plain) + 28 in (padme(28 + 9 + packed), 28 + 9 + packed),
         'padded length')
    if codec == 1:
        inflater = zlib.decompressobj(-15)
        data = inflater.decompress(data, length + 1)
        need(inflater.eof and not inflater.unused_data, 'deflate')
    else:
        need(codec == 0 and length == packed, 'codec')
    need(len(data) == length, 'length')
    return data


def padme(length):
    e = 0
    while 2 ** (e + 1) <= length:
        e += 1
    step = 2 ** (e - len('{:b}'.format(e)))
    return -(-length // step) * step


# PAGES AND LISTS

def kids_read(fields, count):
    out = []
    for _ in range(count):
        kid = {'class': fields.bytes(1), 'name': fields.bytes(32),
               'plain': fields.number(32), 'times': fields.number(32)}
        need(kid['class'] in (b'c', b'i'), 'class of a kid')
        out.append(kid)
    return out


def index_open(key, name, block):
    """A page or list: its refs fields, with the plain rows part."""
    refs, rows = block_open(key, b'i', name, block)
    need(name_index(key, refs) == name, 'name')
    fields = Fields(refs)
    out = {'kind': fields.number(8), 'level': fields.number(8),
           'digest': fields.bytes(32)}
    out['kids'] = kids_read(fields, fields.number(32))
    need(not fields.data, 'bytes after the kids')
    need(name_rows(key, rows) == out['digest'], 'rows digest')
    need((out['kind'] == 1) == (out['level'] == 0), 'level')
    out['rows'] = rows
    return out


def page_rows(page):
    """The rows of a page, each a dictionary."""
    fields, out = Fields(page['rows']), []
    while fields.data:
        out.append(row_read(Fields(fields.bytes(fields.number(32)))))
    return out


def row_read(row):
    out = {'kind': row.bytes(1)}
    flags = row.number(8)
    out['mode'] = row.number(16)
    out['uid'], out['gid'] = row.number(32), row.number(32)
    out['mtime'] = (row.number(64, signed=True), row.number(32))
    out['size'] = row.number(64)
    out['path'] = row.bytes(row.number(16))
    out['uname'] = row.bytes(row.number(8))
    out['gname'] = row.bytes(row.number(8))
    if out['kind'] == b'l':
        out['target'] = row.bytes(row.number(16))
    if out['kind'] in (b'c', b'b'):
        out['device'] = (row.number(32), row.number(32))
    if flags & 1:
        out['link'] = (row.number(64), row.number(32))
    if flags & 8:
        out['atime'] = (row.number(64, signed=True), row.number(32))
    if flags & 2:
        out['xattrs'] = [xattr_read(row) for _ in range(row.number(16))]
    if flags & 4:
        out['digest'] = row.bytes(16)
    if flags & 16:
        out['level'] = row.number(8)
        out['lists'] = [row.number(32) for _ in range(row.number(16))]
    elif out['kind'] == b'-':
        out['extents'] = [extent_read(row) for _ in range(row.number(16))]
        need(sum(length * repeat for _, _, length, repeat in out['extents'])
             == out['size'], 'size')
    need(not row.data, 'bytes after a row')
    return out


def xattr_read(row):
    name = row.bytes(row.number(8))
    chunk, value = row.number(8), row.number(32)
    return (name, value) if chunk else (name, row.bytes(value))


def extent_read(fields):
    extent = (fields.number(32), fields.number(32), fields.number(64),
              fields.number(32))
    if extent[0] == HOLE:
        need(extent[1] == 0 and extent[3] == 1, 'hole')
    return extent


def content(row, kids, chunk):
    """The content of a file; `chunk` gives the data of a kid."""
    out = b''
    for number, offset, length, repeat in row['extents']:
        if number == HOLE:
            out += bytes(length)
        else:
            out += chunk(kids[number])[offset:offset + length] * repeat
    return out


def list_notes(block):
    """(first path, entries, bytes) for each kid of a list of pages."""
    fields, out = Fields(block['rows']), []
    for _ in block['kids']:
        out.append((fields.bytes(fields.number(16)), fields.number(64),
                    fields.number(64)))
    need(not fields.data, 'bytes after the notes')
    return out


# ARCHIVE RECORDS

def record_open(key, name, block):
    refs, names, meta = block_open(key, b'a', name, block)
    need(name_record(key, refs) == name, 'name')
    ed25519.Ed25519PublicKey.from_public_bytes(key[6][32:64]).verify(
        refs[-64:], refs[:-64])
    fields = Fields(refs[:-64])
    need(fields.bytes(18) == b'tarsnap-archive-1\0', 'magic')
    need(fields.bytes(8) == key[1], 'machine')
    out = {'archive': fields.bytes(32), 'series': fields.bytes(16),
           'lineage': fields.bytes(16), 'tid': fields.bytes(16),
           'base n': fields.number(64), 'base hash': fields.bytes(32),
           'complete': fields.number(8), 'sorted': fields.number(8),
           'level': fields.number(8), 'entries': fields.number(64),
           'pages': fields.number(64), 'bytes': fields.number(64)}
    need(fields.bytes(32) == sha(names), 'digest of the names part')
    need(fields.bytes(32) == sha(meta), 'digest of the meta part')
    out['kids'] = kids_read(fields, fields.number(16))
    need(not fields.data, 'bytes after the kids')
    fields = Fields(names)
    fields.bytes(16)
    out['title'] = fields.bytes(fields.number(16))
    out['created'] = fields.number(64)
    need(not fields.data, 'bytes after the names part')
    fields = Fields(meta)
    fields.bytes(16)
    out['host'] = fields.bytes(fields.number(16))
    out['argv'] = [fields.bytes(fields.number(32))
                   for _ in range(fields.number(32))]
    need(not fields.data, 'bytes after the meta part')
    need(archive_id(key, out['title']) == out['archive'], 'archive id')
    return out


# SIGNED HISTORY

def commit_read(key, data):
    signed, signature = data[:-64], data[-64:]
    fields = Fields(signed)
    need(fields.bytes(16) == b'tarsnap-commit-1', 'magic')
    need(fields.bytes(8) == key[1], 'machine')
    out = {'n': fields.number(64), 'previous': fields.bytes(32),
           'kind': fields.number(8), 'tid': fields.bytes(16)}
    out['linked'] = [(fields.bytes(32), fields.bytes(32), fields.bytes(16),
                      fields.number(8)) for _ in range(fields.number(16))]
    out['unlinked'] = [(fields.bytes(32), fields.bytes(32))
                       for _ in range(fields.number(16))]
    out['put'] = (fields.number(64), fields.bytes(32))
    out['deleted'] = (fields.number(64), fields.bytes(32))
    out['live'] = fields.bytes(32)
    out['note'] = fields.bytes(fields.number(16))
    need(not fields.data, 'bytes after the note')
    signer = {1: 1, 4: 1, 2: 2, 3: 3}[out['kind']]
    ed25519.Ed25519PublicKey.from_public_bytes(
        key[6][32 * signer:32 * signer + 32]).verify(
            signature, b'tarsnap-history-1\0' + signed)
    out['hash'] = sha(data)
    return out


def genesis(key):
    return sha(b'tarsnap-genesis-1' + key[1] + key[2] + key[6])


def live_digest(archives):
    """Of (archive id, record, state) each."""
    return sha(b''.join(archive + record + bytes([state])
                        for archive, record, state in sorted(archives)))


def note_open(key, commit):
    plain = AESGCM(mac(key[19], b'tarsnap-note-1')).decrypt(
        commit['note'][:12], commit['note'][12:],
        key[1] + commit['n'].to_bytes(8, 'big'))
    fields = Fields(plain)
    return [fields.number(64) for _ in range(9)]
