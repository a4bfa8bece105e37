#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Writes the examples of tarsnap-format(5) and tarsnap-protocol(7) anew.

usage: tests/format_examples.py        (changes the pages in man/)

The program's own encoders make them, with every key, nonce and time fixed,
so running this twice changes nothing.  (Another zlib may deflate to other
bytes, which open to the same.)  tests/test_format_page.py reads the pages.
"""

import hashlib
import hmac
import os
import re
import struct
import sys
import tempfile
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import tarsnap                                              # noqa: E402

FORMAT = os.path.join(ROOT, 'man', 'tarsnap-format.5')
PROTOCOL = os.path.join(ROOT, 'man', 'tarsnap-protocol.7')

# A block of a page: a comment that says which, and a literal display.
BLOCK = (r'(?m)^\.\\" (example|values) ([a-z-]+)\n'
         r'\.Bd -literal\n((?:(?!\.Ed).*\n)*)\.Ed\n')

TEXT = b'It was a bright cold day in April, and the clocks were striking.\n'
SECONDS = 1700000000


def blocks(page):
    """(example or values, name) -> text, of the displays in a page."""
    with open(page) as file:
        return {found.group(1, 2): found[3].replace('\\&', '')
                for found in re.finditer(BLOCK, file.read())}


def values(text):
    """The lines `key  value` of a display as a dictionary of lists."""
    out = {}
    for line in re.sub(r'\n {14}', ' ', text).splitlines():
        key, _, value = line.partition('  ')
        out.setdefault(key.strip(), []).append(value.strip())
    return out


class Fixed:
    """Stands for os.urandom: bytes that follow from what was asked before."""

    def __init__(self, seed):
        self.seed = seed
        self.count = 0

    def __call__(self, length):
        self.count += 1
        out = b''
        while len(out) < length:
            out += hashlib.sha256(b'%s %d %d' % (self.seed, self.count,
                                                 len(out))).digest()
        return out[:length]


def secret(name):
    return hashlib.sha256(b'tarsnap-format example ' + name).digest()


def example_key():
    """A key of all roles, every secret a hash of its name."""
    from cryptography.hazmat.primitives.asymmetric import x25519
    key = tarsnap.Key()
    key.machine = 0x0123456789abcdef
    key.store = secret(b'store')[:16]
    key.server, key.name = 'backup.example.org:9279', 'example'
    key.pins = [tarsnap.sha256(public_half(secret(b'identity')))]
    for role in (1, 2, 3, 4):
        key.sign_privs[role] = secret(b'sign %d' % role)
        key.sign_pubs[role] = public_half(key.sign_privs[role])
    for field in tarsnap.SECRETS_ALL:
        setattr(key, field, secret(field.encode()))
    for field in ('data', 'refs'):
        private = x25519.X25519PrivateKey.from_private_bytes(
            getattr(key, field + '_priv'))
        setattr(key, field + '_pub', tarsnap.raw_public(private))
    return key


def example_sealer(key):
    """A Sealer whose ephemeral key is fixed."""
    from cryptography.hazmat.primitives.asymmetric import x25519
    fixed = x25519.X25519PrivateKey.from_private_bytes(secret(b'esk'))
    with mock.patch.object(x25519.X25519PrivateKey, 'generate',
                           lambda: fixed):
        sealer = tarsnap.Sealer(key)
        sealer.ephemeral()
    return sealer


def entry(**fields):
    out = tarsnap.Entry()
    out.uname, out.gname, out.mtime = b'eric', b'users', SECONDS * 10 ** 9
    out.uid, out.gid = 1000, 100
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def entries(data):
    """The rows of the example page; kid 0 is the chunk of `data`."""
    return [
        entry(kind=tarsnap.DIRECTORY, mode=0o755, path=b'home'),
        entry(kind=tarsnap.FILE, mode=0o644, path=b'home/april',
              size=len(data), extents=((0, 0, len(data), 1),),
              mtime=SECONDS * 10 ** 9 + 5),
        entry(kind=tarsnap.SYMLINK, mode=0o777, path=b'home/link',
              target=b'april'),
        entry(kind=tarsnap.FILE, mode=0o600, path=b'home/sparse',
              size=4096 + 27, extents=((tarsnap.HOLE, 0, 4096, 1),
                                       (0, 0, 9, 3))),
    ]


class Examples:
    """Everything the page shows: (kind, name) -> text."""

    def __init__(self):
        self.out = {}
        self.key = example_key()
        self.names = tarsnap.Names(self.key)
        self.sealer = example_sealer(self.key)

    def make(self):
        key = self.key
        with mock.patch('os.urandom', Fixed(b'format')):
            self.out['example', 'keyfile'] = tarsnap.key_text(
                tarsnap.key_encode(key)).decode()
            self.show('keyfile', [
                ('machine', key.machine), ('store', key.store),
                ('server', key.server), ('name', key.name),
                ('fingerprint', key.public_hash()),
                ('h0', key.genesis())])
            self.make_blocks()
        return self.out

    def show(self, name, rows):
        self.out['values', name] = ''.join(
            '%-12s  %s\n' % (label, value.hex() if isinstance(value, bytes)
                             else value) for label, value in rows)

    def dump(self, name, data):
        lines = [data[i:i + 32].hex() for i in range(0, len(data), 32)]
        self.out['example', name] = '\n'.join(lines) + '\n'

    def index(self, label, kind, level, kids, rows, more):
        digest = self.names.rows(rows)
        refs = tarsnap.index_refs(kind, level, digest, kids)
        name = self.names.index(refs)
        self.dump(label, self.sealer.seal(tarsnap.INDEX, name, [refs, rows]))
        show = [('name', name), ('kind', kind), ('level', level),
                ('digest', digest)]
        show += [('kid', '%s %s %d %d' % (kid.cls.decode(), kid.name.hex(),
                                          kid.plain, kid.times))
                 for kid in kids]
        self.show(label, show + more)
        return name, refs

    def make_blocks(self):
        # The chunk: compressible, so that its part is deflated.
        data = TEXT * 4
        chunk = self.names.chunk(data)
        self.dump('chunk', self.sealer.seal(tarsnap.CHUNK, chunk, [data]))
        self.show('chunk', [('name', chunk),
                            ('text', '%s, and a newline, %d times' % (
                                TEXT.decode().strip(), 4))])

        # A page with that chunk, and a list with that page.
        rows = entries(data)
        page, _ = self.index(
            'page', tarsnap.PAGE, 0,
            [tarsnap.Kid(tarsnap.CHUNK, chunk, len(data), 2)],
            b''.join(map(tarsnap.row_pack, rows)),
            [('row', row_words(row)) for row in rows])
        size = sum(row.size for row in rows)
        plain = sum(len(tarsnap.row_pack(row)) for row in rows)
        note = (rows[0].path, len(rows), size)
        self.index('list', tarsnap.PAGE_LIST, 1,
                   [tarsnap.Kid(tarsnap.INDEX, page, plain)],
                   tarsnap.list_notes_pack([note]),
                   [('below', '%s %d %d' % (note[0].decode(), *note[1:]))])
        self.make_record(page, plain, len(rows), size)

    def make_record(self, page, plain, count, size):
        # The record of an archive of that one page.
        record = tarsnap.Record()
        record.title, record.created = b'home-2023-11-14', SECONDS
        record.machine = self.key.machine
        record.archive = self.names.archive(record.title)
        series = tarsnap.series_of(record.title)
        record.series = self.names.series(series)
        record.tid = record.lineage = secret(b'tid')[:16]
        record.base = (0, self.key.genesis())
        record.sorted, record.entries, record.pages = True, count, 1
        record.bytes = size
        record.kids = [tarsnap.Kid(tarsnap.INDEX, page, plain)]
        record.argv = [b'tarsnap', b'-c', b'-f', record.title, b'home']
        record.host = b'example'
        parts = tarsnap.record_pack(record, self.key)
        name = self.names.record(parts[0])
        self.dump('record', self.sealer.seal(tarsnap.RECORD, name, parts))
        self.show('record', [
            ('name', name), ('archive', record.archive),
            ('title', record.title.decode()), ('series', series.decode()),
            ('tag', record.series), ('entries', count), ('pages', 1),
            ('bytes', size), ('created', SECONDS),
            ('argv', b' '.join(record.argv).decode()),
            ('host', record.host.decode())])

        # The first commit, which links it.
        commit = tarsnap.Commit(self.key.machine, 1, self.key.genesis(),
                                tarsnap.KIND_WRITE, record.tid)
        commit.linked = [(record.archive, name, record.lineage,
                          tarsnap.COMPLETE)]
        put = [self.names.chunk(TEXT * 4), page, name]
        commit.puts = (len(put), tarsnap.sha256(b''.join(put)))
        commit.live = tarsnap.live_digest(
            {record.archive: (name, record.lineage, tarsnap.COMPLETE)})
        totals = (1000, 500) * 4 + (1,)
        commit.note = tarsnap.note_seal(self.key, 1, totals)
        data = tarsnap.commit_pack(commit, self.key)
        self.dump('commit', data)
        self.show('commit', [
            ('hash', tarsnap.sha256(data)), ('n', 1), ('kind', 1),
            ('tid', commit.tid), ('previous', commit.previous),
            ('linked', '%s %s %s %d' % (
                record.archive.hex(), name.hex(), record.lineage.hex(),
                tarsnap.COMPLETE)),
            ('put', '%d %s' % (commit.puts[0], commit.puts[1].hex())),
            ('live', commit.live),
            ('note', ' '.join(map(str, totals)))])


class ProtocolExamples(Examples):
    """What tarsnap-protocol(7) shows; frames and objects of a server."""

    user, name, password = 'eric@example.org', 'example', b'thirteen strikes'

    def make(self):
        with mock.patch('os.urandom', Fixed(b'format')):
            self.make_statement()
            self.make_register()
            self.make_store()
        return self.out

    def make_statement(self):
        identity, key = secret(b'identity'), self.key
        public = public_half(identity)
        serial, nonce = tarsnap.U64.pack(3), secret(b'server nonce')
        signed = (b'tarsnap-server-1\0' + key.store + serial + bytes(32))
        self.statement = (b'\0\1' + public + key.store + serial + nonce
                          + tarsnap.sign(identity, signed))
        self.frame('statement', tarsnap.STATEMENT, 0, self.statement)
        self.show('statement', [
            ('version', 1), ('identity', public),
            ('fingerprint', tarsnap.sha256(public)), ('store', key.store),
            ('serial', 3), ('nonce', nonce)])

        # AUTH of the write role over a pipe.
        mine = secret(b'client nonce')
        head = struct.pack('>HQB', 1, key.machine, tarsnap.ROLE_WRITE)
        signed = (b'tarsnap-auth-1\0\0\1' + bytes([tarsnap.TRANSPORT_STDIO])
                  + key.store + bytes(32) + head[2:] + nonce + mine)
        self.frame('auth', tarsnap.AUTH, 1, head + mine + tarsnap.sign(
            key.sign_privs[tarsnap.ROLE_WRITE], signed))

    def make_register(self):
        salt = secret(b'salt')
        user, name = self.user.encode(), self.name.encode()
        first = secret(b'register nonce') + bytes([len(user)]) + user
        second = bytes([len(name)]) + name + b''.join(
            self.key.sign_pubs[role] for role in (1, 2, 3, 4))
        client = hmac.digest(hashlib.scrypt(
            self.password, salt=salt, n=1 << 14, r=8, p=1, maxmem=1 << 26,
            dklen=32), b'client', 'sha256')
        stored = tarsnap.sha256(client)
        mask = hmac.digest(stored, self.statement + first + second, 'sha256')
        self.dump('register-one', first)
        self.dump('register-two', second + bytes(
            a ^ b for a, b in zip(client, mask)))
        self.show('register', [
            ('user', self.user), ('machine', self.name),
            ('password', self.password.decode()), ('salt', salt),
            ('cost', '14 8 1'), ('stored', stored)])

    def make_store(self):
        import tarsnapd
        data = TEXT * 4
        name = self.names.chunk(data)
        block = self.sealer.seal(tarsnap.CHUNK, name, [data])
        tid = secret(b'tid')[:16]
        with tempfile.TemporaryDirectory() as temp:
            spool = tarsnapd.Spool(temp, tid, os.open(temp, os.O_RDONLY))
            spool.append([(tarsnap.CHUNK, name, block)])
            path, segment = spool.finish()
            with open(path, 'rb') as file:
                self.dump('segment', file.read())
            spool.close(True)
        entry = tarsnapd.Entry(self.key.machine, 1, bytes(32), SECONDS)
        key = tarsnapd.segment_key(self.key.machine, tid, 1,
                                   segment.table_hash)
        entry.segments = [(key, segment.size, segment.table_hash, 1, b'\0')]
        entry.blocks, entry.bytes = 1, len(block)
        self.dump('log', tarsnapd.log_encode(entry))

    def frame(self, name, kind, rid, body):
        self.dump(name, tarsnap.FRAME.pack(len(body), kind, rid) + body)


def public_half(private):
    from cryptography.hazmat.primitives.asymmetric import ed25519
    return tarsnap.raw_public(
        ed25519.Ed25519PrivateKey.from_private_bytes(private))


def row_words(row):
    """A row as one line of words."""
    out = '%c %o %d %d %s %s %d.%09d %d %s' % (
        row.kind, row.mode, row.uid, row.gid, row.uname.decode(),
        row.gname.decode(), *divmod(row.mtime, 10 ** 9), row.size,
        row.path.decode())
    if row.target:
        out += ' -> ' + row.target.decode()
    return out


def rewrite(page, texts):
    """Put `texts` into the displays of a page; a long line is folded."""
    with open(page) as file:
        old = file.read()

    def display(found):
        text = texts.get(found.group(1, 2))
        if text is None:
            return found[0]
        return '.\\" %s %s\n.Bd -literal\n%s.Ed\n' % (
            found[1], found[2], fold(text).replace('\n.', '\n\\&.'))

    new = re.sub(BLOCK, display, old)
    missing = set(texts) - {found.group(1, 2)
                            for found in re.finditer(BLOCK, new)}
    if missing:
        raise SystemExit('no place in %s for %s' % (page, sorted(missing)))
    if new != old:
        with open(page, 'w') as file:
            file.write(new)


def fold(text, width=78):
    """Lines over `width` go on, after 14 blanks, on the next."""
    out = []
    for line in text.splitlines():
        while len(line) > width:
            at = line.rfind(' ', 15, width)
            at = at if at > 0 else width
            out.append(line[:at].rstrip())
            line = ' ' * 14 + line[at:].lstrip()
        out.append(line)
    return '\n'.join(out) + '\n'


def main():
    rewrite(FORMAT, Examples().make())
    rewrite(PROTOCOL, ProtocolExamples().make())


if __name__ == '__main__':
    main()
