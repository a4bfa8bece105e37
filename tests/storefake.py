# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A server in memory that answers LIST and GET, and archives to put into it.

Blocks are made by the encoders of tarsnap.py; what is not of the reading side
(chunk cutting, deduplication, transactions) is left out or fixed, so that a
test says exactly which blocks there are.
"""

import collections
import threading

import samples
import tarsnap
from tarsnap import CHUNK, FILE, HOLE, INDEX, RECORD, U16, U64, Kid

NOW = 1700000000


def options(**given):
    """What the command line gives to -x of `a`; `given` overrides."""
    opt = tarsnap.Settings()
    opt.letter, opt.mode, opt.names = 'x', '-x', [b'a']
    opt.finish()
    opt.own = opt.perms = None
    for name, value in given.items():
        if not hasattr(opt, name):
            raise AttributeError(name)
        setattr(opt, name, value)
    return opt


class Store:
    """Blocks and archives of one machine."""

    def __init__(self, blocks=None):
        self.key = samples.full_key()
        self.names = tarsnap.Names(self.key)
        self.sealer = tarsnap.Sealer(self.key)
        self.blocks = {} if blocks is None else blocks
        self.live = {}          # id -> (record, lineage, state, time)

    def put(self, cls, name, parts):
        if name not in self.blocks:
            self.blocks[name] = self.sealer.seal(cls, name, parts)

    def chunk(self, data, times=1):
        name = self.names.chunk(data)
        self.put(CHUNK, name, [data])
        return Kid(CHUNK, name, len(data), times)

    def index(self, kind, level, kids, rows):
        refs = tarsnap.index_refs(kind, level, self.names.rows(rows), kids)
        name = self.names.index(refs)
        self.put(INDEX, name, [refs, rows])
        return Kid(INDEX, name, len(refs) + len(rows))

    def commit(self):
        """C_1, which links all there is."""
        commit = tarsnap.Commit(self.key.machine, 1, self.key.genesis(),
                                tarsnap.KIND_WRITE, bytes(16))
        commit.linked = [(archive,) + link[:3]
                         for archive, link in self.live.items()]
        commit.live = tarsnap.live_digest(self.live)
        return tarsnap.commit_pack(commit, self.key)


class Builder:
    """Makes one archive; entries come in the order they are added."""

    def __init__(self, store, title=b'a', per_page=4, fan=4, chunk=65536,
                 lists_above=64, small=0):
        self.store = store
        self.title = title
        self.per_page = per_page    # entries to a page
        self.fan = fan              # kids to a list
        self.chunk = chunk          # bytes to a chunk of one file
        self.lists_above = lists_above  # extents of a row
        self.small = small          # bytes to a shared chunk; 0: none
        self.pages = []             # (kid, first member, entries, bytes)
        self.waiting = []           # (entry, content) of the open page
        self.paths = []
        self.bytes = 0

    def add(self, path, kind=FILE, data=b'', parts=None, **fields):
        """One entry.  `parts` are bytes, (bytes, repeat) or hole lengths."""
        entry = tarsnap.Entry()
        entry.path, entry.kind = path, kind
        entry.mode = 0o755 if kind == tarsnap.DIRECTORY else 0o644
        entry.mtime = NOW * 10 ** 9
        for name, value in fields.items():
            setattr(entry, name, value)
        if parts is None:
            parts = [data[at:at + self.chunk]
                     for at in range(0, len(data), self.chunk)]
        if kind == FILE:
            entry.size = sum(
                part if isinstance(part, int) else
                len(part[0]) * part[1] if isinstance(part, tuple) else
                len(part) for part in parts)
        self.waiting.append((entry, parts))
        self.paths.append(path)
        if len(self.waiting) >= self.per_page:
            self.page_end()
        return self

    def page_end(self):
        """Write the open page."""
        if not self.waiting:
            return
        self.kids, self.numbers = [], {}
        self.shared = []            # (entry, data) for the next shared chunk
        for entry, parts in self.waiting:
            entry.xattrs = tuple(
                (name, self.kid(self.store.chunk(value))
                 if len(value) > tarsnap.INLINE_XATTR else value)
                for name, value in entry.xattrs)
            if self.small and 0 < entry.size <= self.small \
                    and len(parts) == 1:
                self.shared.append((entry, parts[0]))
                if sum(len(data) for _, data in self.shared) >= self.small:
                    self.share()
            else:
                self.extents(entry, parts)
        self.share()
        rows = b''.join(tarsnap.row_pack(entry) for entry, _ in self.waiting)
        size = sum(entry.size for entry, _ in self.waiting)
        kid = self.store.index(tarsnap.PAGE, 0, self.kids, rows)
        self.pages.append((kid, self.waiting[0][0].path, len(self.waiting),
                           size))
        self.bytes += size
        self.waiting = []

    def share(self):
        """Small files in one chunk."""
        if not self.shared:
            return
        number = self.kid(self.store.chunk(
            b''.join(data for _, data in self.shared)))
        at = 0
        for entry, data in self.shared:
            entry.digest = self.store.names.content(data)
            entry.extents = ((number, at, len(data), 1),)
            at += len(data)
        self.shared = []

    def kid(self, kid):
        """The number of `kid` in the open page."""
        if kid.name not in self.numbers:
            self.numbers[kid.name] = len(self.kids)
            self.kids.append(kid)
        return self.numbers[kid.name]

    def extents(self, entry, parts):
        if entry.kind != FILE:
            return
        made = []               # (Kid or None, length, repeat)
        for part in parts:
            if isinstance(part, int):
                made.append((None, part, 1))
            else:
                data, repeat = part if isinstance(part, tuple) else (part, 1)
                made.append((self.store.chunk(data), len(data), repeat))
        if len(made) > self.lists_above:
            entry.level, kids = extent_lists(self.store, made, self.fan)
            entry.lists = tuple(self.kid(kid) for kid in kids)
        else:
            entry.extents = tuple(
                (HOLE if kid is None else self.kid(kid), 0, length, repeat)
                for kid, length, repeat in made)

    def finish(self, complete=True, ordered=None, created=NOW, argv=(),
               state=None):
        """Link the archive; its Record."""
        self.page_end()
        record = tarsnap.Record()
        record.level, nodes = 0, self.pages
        while len(nodes) > 64 or (len(nodes) > self.fan and self.fan < 64):
            record.level += 1
            nodes = [page_list(self.store, record.level, nodes[at:at +
                                                               self.fan])
                     for at in range(0, len(nodes), self.fan)]
        keys = [path.split(b'/') for path in self.paths]
        record.title, record.created = self.title, created
        record.machine = self.store.key.machine
        record.archive = self.store.names.archive(self.title)
        record.series = record.lineage = record.tid = bytes(16)
        record.base = (0, self.store.key.genesis())
        record.complete = complete
        record.sorted = keys == sorted(keys) if ordered is None else ordered
        record.entries, record.pages = len(self.paths), len(self.pages)
        record.bytes = self.bytes
        record.kids = [node[0] for node in nodes]
        record.argv = list(argv)
        parts = tarsnap.record_pack(record, self.store.key)
        record.name = self.store.names.record(parts[0])
        self.store.put(RECORD, record.name, parts)
        self.store.live[record.archive] = (
            record.name, bytes(16), state or (
                tarsnap.COMPLETE if complete else tarsnap.PARTIAL), created)
        return record


def page_list(store, level, nodes):
    notes = [node[1:] for node in nodes]
    kid = store.index(tarsnap.PAGE_LIST, level, [node[0] for node in nodes],
                      tarsnap.list_notes_pack(notes))
    return (kid, notes[0][0], sum(note[1] for note in notes),
            sum(note[2] for note in notes))


def extent_lists(store, made, fan):
    """(level, kids) of lists over (Kid or None, length, repeat)."""
    nodes, level = [], 1
    for at in range(0, len(made), fan):
        kids, rows = [], b''
        for kid, length, repeat in made[at:at + fan]:
            number = HOLE
            if kid:
                number = len(kids)
                kids.append(kid)
            rows += tarsnap.EXTENT.pack(number, 0, length, repeat)
        nodes.append(store.index(tarsnap.EXTENT_LIST, 1, kids, rows))
    while len(nodes) > fan:
        level += 1
        nodes = [store.index(tarsnap.EXTENT_LIST, level, nodes[at:at + fan],
                             bytes(8 * len(nodes[at:at + fan])))
                 for at in range(0, len(nodes), fan)]
    return level, nodes


class FakeChannel:
    """One connection.  Answers are made when they are waited for."""

    def __init__(self, remote):
        self.remote = remote
        self.lock = threading.Lock()
        self.answers = {}
        self.last = 0
        self.failed = None

    def post(self, kind, *body):
        with self.lock:
            if self.failed:
                raise self.failed
            self.last += 1
            self.answers[self.last] = collections.deque(
                self.remote.answer(kind, b''.join(body)))
            return self.last

    def ready(self, rid):
        return rid % 2          # made at once; or, as it seems, on its way

    def next(self, rid):
        with self.lock:
            if self.failed:
                raise self.failed
            kind, body = self.answers[rid].popleft()
            if kind == tarsnap.BLOCK:
                try:
                    body = self.remote.block(body)
                except tarsnap.ChannelLost as e:
                    self.failed = e
                    raise
                if isinstance(body, tarsnap.Refused):
                    kind = tarsnap.ERROR
                    body = U16.pack(body.code) + str(body).encode()
            return kind, body

    def forget(self, rid):
        self.answers.pop(rid, None)


class FakeRemote:
    """Stands for tarsnap.Remote.

    `mangle(name, block)` may give another block, or raise; the n-th block
    of all for n in `lose` breaks the connection instead.
    """

    def __init__(self, store, mangle=None, lose=()):
        self.store = store
        self.key = store.key
        self.head = (1, tarsnap.sha256(store.commit()))
        self.mangle = mangle
        self.lose = set(lose)
        self.channel = None
        self.connects = 0
        self.asked = []         # names, in the order they were asked for
        self.sent = 0           # blocks
        self.gets = 0           # requests

    def connect(self):
        if self.channel is None or self.channel.failed:
            self.channel = FakeChannel(self)
            self.connects += 1
        return self.channel

    def ask(self, kind, *body):
        return list(self.answer(kind, b''.join(body)))

    def answer(self, kind, body):
        if kind == tarsnap.LIST:
            rows = [tarsnap.ARCHIVE_ROW.pack(archive, *link)
                    for archive, link in sorted(self.store.live.items())]
            return [(tarsnap.COMMIT_OBJECT,
                     U64.pack(NOW) + self.store.commit()),
                    (tarsnap.ARCHIVES, U16.pack(len(rows)) + b''.join(rows))]
        assert kind == tarsnap.GET, kind
        assert body[0] == 3 and len(body) == 3 + 32 * U16.unpack(
            body[1:3])[0]
        names = [body[at:at + 32] for at in range(3, len(body), 32)]
        assert len(names) <= tarsnap.CEILING['names']
        self.asked += names
        self.gets += 1
        return [(tarsnap.BLOCK, name) for name in names] + [
            (tarsnap.OK, b'')]

    def block(self, name):
        """The body of a BLOCK, or a Refused in its place."""
        self.sent += 1
        if self.sent in self.lose:
            raise tarsnap.ChannelLost('lost by the test')
        block = self.store.blocks.get(name)
        if self.mangle:
            block = self.mangle(name, block)
        if block is None:
            return tarsnap.Refused(tarsnap.E_NOBLOCK, 'no such block')
        if isinstance(block, tarsnap.Refused):
            return block
        return name + block
