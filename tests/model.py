#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A model checker: the server's own steps under a cruel, seeded scheduler.

usage: tests/model.py [--seed N] [--count N] [--seconds N] [--jobs N]
                      [--off RULE] [--replay SEED] [--list]

Two servers of one store run the code of tarsnapd.py, unchanged: sessions,
catching up, commits, the cleaner.  Each wish they yield (a store verb, a call
of the index or the spool) is carried out here, when the scheduler likes: it
may stall, be done and not be heard of, fail before or after it was done, be
done twice, or be done much later.  Connections break, servers and clients
die and begin anew, with what they had on their disks or without it.  All that
is drawn comes from one number, the seed; the same seed does the same again.

Clients are small models that keep the rules of tarsnap-commits(7): a writer
with checkpoints, its clone, a pruner, an undeleter, a reader, a nuke key, and
a thief who keeps no rule.  After every log entry, every deletion and every
answer a second, independent account of what must be true is held against what
is (`Oracle`); whatever differs is a Violation.

`--off RULE` takes away one rule, by replacing a line of the function that
keeps it; then a violation must be found (see RULES; --list shows them).
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import inspect
import multiprocessing
import os
import random
import sqlite3
import struct
import sys
import textwrap
import time
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import rawclient                                # noqa: E402
import tarsnap                                  # noqa: E402
import tarsnapd                                 # noqa: E402
from rawclient import (                         # noqa: E402
    CODE, COMPLETE, D, N, OPEN, PARTIAL, R, REQUEST, W, added, names_body,
    part, sha, u16, u64)
from tarsnapd import (                          # noqa: E402
    ROW, Damaged, NoObject, StoreError)

MACHINE = 7
STORE_ID = b'store of a model'
PUBLIC = {role: bytes([role]) * 32 for role in (R, W, D, N)}
KINDS = {'write': 1, 'delete': 2, 'nuke': 3, 'abort': 4, 'undelete': 5}
WORDS = {number: word for word, number in KINDS.items()}
DAY = tarsnapd.DAY
START = 10 ** 9                 # seconds, when the clock of a world begins

STEPS = 1200            # after these nothing goes wrong any more, so that all
#                         can do their work
MOST_STEPS = 20000      # a schedule that is not over by then is stuck


class Violation(Exception):
    """A promise was broken.  `kind`: lost, doubled, resurrected, history
    (chain, `live`, or no rebuild), answer (a client was told an untruth),
    stuck, or bug (an exception nobody meant).
    """

    def __init__(self, kind, text):
        super().__init__('%s: %s' % (kind, text))
        self.kind = kind


##############################################################################
# Blocks and keys
#
# What a block holds is its label: a class, a letter for each chunk of a page,
# the pages of a record.  Its name is a hash of the label.  Instead of Ed25519
# signatures there are hashes, which are faster and which nobody here forges.
##############################################################################


class Signer:
    """A private key as far as rawclient.Host needs one."""

    def __init__(self, role):
        self.public = PUBLIC[role]

    def sign(self, message):
        return hashlib.sha512(self.public + message).digest()


class Keys:
    private = {role: Signer(role) for role in PUBLIC}
    public = b''.join(PUBLIC[role] for role in (R, W, D, N))


def verify(public, signature, message):
    """Stands for tarsnapd.verify."""
    return signature == hashlib.sha512(public + message).digest()


def name_of(label):
    return sha(label)


def chunk_label(letter):
    return b'c' + letter.encode()


def page_label(letters):
    return b'i' + ''.join(sorted(letters)).encode()


def record_label(title, base, run, pages):
    """A record is of one title, base, and run of a client."""
    return b'a' + '|'.join([title, '%d.%s' % (base[0], base[1].hex()[:8]),
                            run] + sorted(pages)).encode()


def kids_of(label):
    """Labels of what a block refers to."""
    if label[:1] == b'i':
        return [chunk_label(letter) for letter in label[1:].decode()]
    if label[:1] == b'a':
        return [page_label(page) for page in
                label[1:].decode().split('|')[3:]]
    return []


def seal(label):
    """The block of a label, in the shape of its class."""
    cls = label[:1]
    recipients = {b'c': (1,), b'i': (2, 1), b'a': (2, 2, 1)}[cls]
    body = b'\x01' + cls + bytes([len(recipients)]) + bytes(32)
    parts = [label.ljust(28, b'\0')] + [bytes(28)] * (len(recipients) - 1)
    return body + b''.join(map(part, recipients, parts))


def unseal(block):
    """The label in a block, or in its refs view."""
    _, length = struct.unpack_from('>BI', block, 35)
    return bytes(block[40:40 + length]).rstrip(b'\0')


##############################################################################
# Store, spool, index, server
#
# The store's verbs on a dict: each happens at once and as a whole; what makes
# them cruel is in World.  Spool and index are tarsnapd's own with memory for
# their files.
##############################################################################


class Store:
    """Objects in memory; `watch` (an Oracle) is told what happens to them."""

    def __init__(self, watch, clock):
        self.objects = {}           # key -> bytes
        self.times = {}             # key -> when it was made
        self.clock = clock
        self.watch = watch

    def put(self, key, data):
        if not self.absent(key):
            return False
        self.objects[key] = data
        self.times[key] = self.clock()
        self.watch.made(key, data)
        return True

    def absent(self, key):
        """True if a put may make `key`."""
        return key not in self.objects

    def get(self, key, offset=0, length=None):
        if key not in self.objects:
            raise NoObject('read', key)
        data = self.objects[key][offset:]
        if length is None:
            return data
        if len(data) < length:
            raise Damaged('read', key, 'short read')
        return data[:length]

    def delete(self, key):
        if self.objects.pop(key, None) is not None:
            self.watch.deleted(key)

    def list(self, prefix):
        return sorted(x for x in self.objects if x.startswith(prefix))

    def size(self, key):
        data = self.objects.get(key)
        return None if data is None else len(data)

    def made(self, key):
        return self.times.get(key) if key in self.objects else None


def memory_write(fd, data):
    """Stands for tarsnapd.write_all; the descriptor is a bytearray."""
    fd += data


def memory_read(fd, offset, length):
    """Stands for tarsnapd.read_range."""
    return bytes(fd[offset:offset + length])


class Tables(tarsnapd.Tables):
    """Tables of closed segments, in memory."""

    def add(self, table):
        self.places.append(table)

    def __iter__(self):
        return iter(self.places)


class Listed(tarsnapd.Listed):
    """Names with numbers, in memory."""

    def __init__(self, path=None):
        self.close()

    def close(self):
        self.names = {}

    def __len__(self):
        return len(self.names)

    def add(self, names, first=False):
        before = len(self.names)
        for name, number in names:
            if not first or name not in self.names:
                self.names[name] = number
        return len(self.names) - before

    def get(self, name, default=None):
        return self.names.get(name, default)

    def parts(self):
        return [sorted(self.names)] if self.names else []


class Spool(tarsnapd.Spool):
    """A spool whose files are byte arrays of a Shelf."""

    stem = ''

    def __init__(self, shelf, tid):
        self.shelf = shelf
        self.tid = tid
        self.fd, self.number, self.size = None, 1, 0
        self.table = bytearray()
        self.closed, self.rows = Tables(''), 0
        self.withdrawn, self.deleted = Listed(), Listed()

    @property
    def path(self):
        """What finish() hands to the store: the content itself."""
        return bytes(self.fd)

    def drop(self):
        if self.fd is not None:
            self.fd = None
            self.shelf.files.pop((self.tid, self.number), None)
            self.number += 1
        self.size = 0
        self.table = bytearray()

    def scan(self, closed, keep):
        self.number = max(closed, default=0) + 1
        for tid, number in sorted(self.shelf.files):
            if tid != self.tid:
                continue
            if number < self.number or not keep:
                del self.shelf.files[tid, number]
                self.number = max(self.number, number + 1)
                continue
            self.number, self.fd = number, self.shelf.files[tid, number]
            self.size = self._scan_entries(len(self.fd))
            del self.fd[self.size:]
            break

    def close(self, remove=False):
        self.clear()
        if self.fd is not None and remove:
            self.shelf.files.pop((self.tid, self.number), None)
        self.fd = None
        self.shelf.locks.pop(self.tid, None)

    def wanted(self):
        return False

    def _create(self):
        self.fd = self.shelf.files[self.tid, self.number] = bytearray(
            tarsnapd.SEGMENT_MAGIC)
        self.size = len(self.fd)


class Shelf:
    """The spool directory of a server, in memory."""

    def __init__(self):
        self.files = {}             # (tid, number) -> bytearray
        self.locks = {}             # tid -> name of the process

    def open(self, process, tid):
        if self.locks.setdefault(tid, process) != process:
            return None
        return Spool(self, tid)

    def sweep(self, process, before):
        """Its files have no times: what cleaners left goes."""
        for tid, number in list(self.files):
            if tid.startswith(tarsnapd.CLEANER) and tid not in self.locks:
                del self.files[tid, number]


class Index(tarsnapd.Index):
    """An index in memory."""

    def __init__(self):
        self.db = sqlite3.connect(':memory:', isolation_level=None)
        self.cache, self.fresh, self.doubt = 4, True, None
        self.empty().backup(self.db)

    @staticmethod
    @functools.lru_cache(None)
    def empty():
        """A database with the tables, to be copied: that is faster."""
        db = sqlite3.connect(':memory:', isolation_level=None)
        for statement in tarsnapd.INDEX_SCHEMA.split(';'):
            db.execute(statement)
        return db


class Server:
    """What a Session asks of a tarsnapd.Server, and a host's disk."""

    read_only = frozen = amnesty = False
    delete_delay = serial = 0
    prices = None
    secret = identity_public = cert_hash = bytes(32)
    store_id = STORE_ID

    def __init__(self, name):
        self.name = name
        self.shelf = Shelf()
        self.index = Index()
        self.open = {}              # of its process `serve`
        self.telling = collections.Counter()
        self.cleaning = None        # Task of its process `clean`

    def vouch(self, cert_hash):
        return bytes(64)

    def spool(self, process, wish):
        """Carry out a wish to the spool."""
        if wish[1] is not None:
            return getattr(wish[1], wish[2])(*wish[3:])
        if wish[2] in ('open', 'sweep'):
            return getattr(self.shelf, wish[2])(process, wish[4])
        assert wish[2] in ('open_elsewhere', 'held', 'want'), wish
        return 0


##############################################################################
# Oracle
#
# A second account of what the log means, written from tarsnap-protocol(7) and
# sharing no code with the index.  It sees each object when it is made, knows
# what every client meant by its commits, and speaks up at once.
##############################################################################


class Attempt:
    """A commit that a client has signed, and what it means by it."""

    def __init__(self, raw, kind, tid, lineage, puts, deletes, linked,
                 unlinked):
        self.raw = raw
        self.hash = sha(raw)
        self.n, self.previous = struct.unpack_from('>Q32s', raw, 24)
        self.kind = kind
        self.tid = tid
        self.lineage = lineage
        self.puts = list(puts)          # names, in order; of an undelete,
        #                                 what it revives
        self.deletes = set(deletes)
        self.linked = list(linked)
        self.unlinked = list(unlinked)


class Oracle:
    """What is true."""

    def __init__(self, world):
        self.world = world
        self.store = None
        self.digests = {}           # key -> SHA-256 of what it ever held
        self.attempts = {}          # SHA-256 -> Attempt
        self.labels = {}            # name -> label
        self.k, self.log_hash, self.time = 0, bytes(32), 0
        self.chain = [sha(b'tarsnap-genesis-1' + u64(MACHINE) + STORE_ID
                          + Keys.public)]
        self.times = [0]            # receive times, by n
        self.live = {}              # name -> (segment key, offset)
        self.archives = {}          # id -> (record, lineage, state)
        self.kept = {}              # name -> (key, offset, when deleted)
        self.dropped = set()        # keys
        self.erased = False         # by the operator
        self.finished = collections.Counter()   # (title, run) committed
        self.born = {}              # live name -> log entry
        self.dead = []              # Attempts that clients gave up

    def check(self, good, kind, text, *values):
        if not good:
            raise Violation(kind, text % values)

    # What happens to the store.

    def made(self, key, data):
        """An object is there now."""
        digest = sha(data)
        new = key not in self.digests
        self.check(self.digests.setdefault(key, digest) == digest, 'doubled',
                   'key %s is used for two contents', key)
        if new and key.startswith('log/'):
            entry = tarsnapd.log_decode(MACHINE, self.k + 1, data)
            self.check(key == tarsnapd.log_key(MACHINE, self.k + 1),
                       'history', '%s is not the next entry', key)
            self.replay(entry)

    def deleted(self, key):
        """An object is gone."""
        home = 'seg/' + key.partition('/')[2]
        self.check(home in self.dropped or not key.startswith((
            'seg/', 'list/')), 'lost', '%s is deleted, which no log entry '
            'dropped', key)
        for name, (home, _) in self.live.items():
            self.check(home != key, 'lost', 'live block %s was in %s, which '
                       'is deleted', self.say(name), key)
        for name, (home, _, when) in self.kept.items():
            self.check(home != key or not self.held(when), 'lost',
                       'block %s, deleted within the delay, was in %s',
                       self.say(name), key)

    def held(self, when):
        """True if what was deleted then must still be kept."""
        return when + self.world.delay > self.world.clock

    def say(self, name):
        return repr(self.labels.get(name, name))

    # What the log says.

    def replay(self, entry):
        self.check(entry.previous == self.log_hash, 'history',
                   'log entry %d does not follow', entry.k)
        self.check(entry.time >= self.time, 'history', 'time goes back')
        self.k, self.log_hash, self.time = entry.k, entry.hash, entry.time
        places = self.places(entry)
        if entry.erased is not None:
            self.replay_erased()
        elif entry.commit:
            self.check(not self.erased, 'resurrected',
                       'a commit after all was erased')
            self.replay_commit(entry, places)
        else:
            self.replay_moves(entry, places)
        for key in entry.drops:
            self.drop(key)
        self.check(entry.blocks == len(self.live), 'history',
                   'log entry %d counts %d live blocks, there are %d',
                   entry.k, entry.blocks, len(self.live))
        self.check_closed()

    def replay_erased(self):
        self.world.stats['erased'] += 1
        self.check(not self.erased, 'doubled', 'all is erased once more')
        self.erased = True
        for what in (self.live, self.kept, self.archives):
            what.clear()

    def places(self, entry):
        """[(name, key, offset)] of entries that are not dead on arrival;
        their segments must be there, and not be dropped.
        """
        out = []
        for key, size, digest, count, dead in entry.segments:
            data = self.store.objects.get(key)
            self.check(data is not None and key not in self.dropped, 'lost',
                       'log entry %d names %s, which is gone', entry.k, key)
            table = data[-tarsnapd.FOOTER.size - count * ROW.size:
                         -tarsnapd.FOOTER.size]
            self.check(len(data) == size and sha(table) == digest, 'lost',
                       'log entry %d names %s, which is another', entry.k,
                       key)
            for i, row in enumerate(ROW.iter_unpack(table)):
                if not tarsnapd.bit(dead, i):
                    out.append((row[0], key, row[2]))
        return out

    def replay_commit(self, entry, places):
        attempt = self.attempts.get(sha(entry.commit))
        self.check(attempt, 'history', 'a commit nobody made')
        self.check(attempt.n == len(self.chain)
                   and attempt.previous == self.chain[-1], 'history',
                   'commit %d does not follow', attempt.n)
        self.chain.append(attempt.hash)
        self.times.append(entry.time)
        self.world.stats[WORDS[attempt.kind]] += 1
        gone = set(self.live) if attempt.kind == KINDS['nuke'] \
            else attempt.deletes
        for name in sorted(gone):
            self.check(name in self.live, 'history', 'commit %d deletes %s, '
                       'which is not live', attempt.n, self.say(name))
            self.kept[name] = self.live.pop(name) + (entry.time,)
        if attempt.kind == KINDS['undelete']:
            self.revive(attempt)
        elif attempt.kind == KINDS['write']:
            fresh = {}
            for name, key, offset in places:
                self.check(name not in fresh and name not in self.live,
                           'doubled', 'commit %d counts %s twice', attempt.n,
                           self.say(name))
                fresh[name] = (key, offset)
            self.check(set(fresh) == set(attempt.puts) - set(self.live),
                       'lost', 'commit %d puts something else than its '
                       'client says', attempt.n)
            self.live.update(fresh)
            for name in fresh:
                self.kept.pop(name, None)
                self.born[name] = entry.k
        self.replay_archives(attempt)

    def revive(self, attempt):
        for name in attempt.puts:
            self.check(name in self.kept
                       and self.kept[name][0] not in self.dropped, 'lost',
                       'commit %d revives %s, which is gone', attempt.n,
                       self.say(name))
            self.live[name] = self.kept.pop(name)[:2]
            self.born[name] = self.k

    def replay_archives(self, attempt):
        if attempt.kind == KINDS['nuke']:
            self.archives.clear()
        for archive, record in attempt.unlinked:
            found = self.archives.pop(archive, None)
            self.check(found and found[0] == record, 'history',
                       'commit %d unlinks an archive that is not there',
                       attempt.n)
            again = (archive, record, found[1], PARTIAL)
            self.check(attempt.kind != KINDS['write'] or found[2] == OPEN and
                       (found[1] == attempt.lineage
                        or again in attempt.linked), 'lost',
                       'a write key removed an archive')
        for archive, *link in attempt.linked:
            self.check(archive not in self.archives, 'lost',
                       'commit %d takes the place of another archive',
                       attempt.n)
            self.archives[archive] = tuple(link)
            self.check(link[0] in self.live, 'lost',
                       'an archive without its record')
            words = self.labels[link[0]].decode().split('|')
            if link[2] == COMPLETE and attempt.kind == KINDS['write']:
                self.finished[words[0], words[2]] += 1
                self.check(self.finished[words[0], words[2]] == 1, 'doubled',
                           'run %s stored %s twice', words[2], words[0])
        live = sha(b''.join(a + x[0] + bytes([x[2]])
                            for a, x in sorted(self.archives.items())))
        commit = tarsnapd.commit_decode(attempt.raw)
        self.check(commit.live == live, 'history', 'commit %d signs other '
                   'archives than there are', attempt.n)

    def replay_moves(self, entry, places):
        self.world.stats['copies'] += len(places)
        for name, key, offset in places:
            self.check(name in self.live, 'resurrected', 'the cleaner brings '
                       '%s back', self.say(name))
            self.check(self.live[name][0] in entry.drops, 'doubled',
                       'a copy of %s, which stays where it is',
                       self.say(name))
            self.live[name] = (key, offset)

    def drop(self, key):
        self.dropped.add(key)
        self.world.stats['drops'] += 1
        for name, (home, _) in self.live.items():
            self.check(home != key, 'lost', 'live block %s is in %s, which '
                       'is dropped', self.say(name), key)
        for name, (home, _, when) in self.kept.items():
            self.check(home != key or not self.held(when), 'lost', 'block '
                       '%s, deleted within the delay, is in %s, which is '
                       'dropped', self.say(name), key)

    def check_closed(self):
        """What a live block refers to is live."""
        for name in self.live:
            for kid in kids_of(self.labels[name]):
                self.check(name_of(kid) in self.live, 'lost',
                           '%s refers to %r, which is not live',
                           self.say(name), kid)
        for archive, (record, _, _) in self.archives.items():
            self.check(record in self.live, 'lost',
                       'an archive without its record')

    # What clients are told, and believe.

    def committed(self, raw):
        """True if the commit `raw` exists."""
        attempt = self.attempts.get(sha(raw))
        return attempt is not None and self.chain[attempt.n:][:1] == [
            attempt.hash]

    def answered(self, link, kind, body):
        """The server answers a request on `link`."""
        request, data = link.request or ('', b'')
        self.check(kind != tarsnapd.ERROR or body[:2] != u16(8), 'answer',
                   'something is said to be lost: %s', body)
        self.check(kind != tarsnapd.ERROR or body[:2] != u16(16)
                   or b'made to fail' in body or b'made anew' in body,
                   'answer', 'an internal error without a fault: %s', body)
        if request not in ('CHECKPOINT', 'COMMIT', 'NUKE'):
            return
        if kind == tarsnapd.COMMITTED:
            self.check(self.committed(data), 'answer',
                       'a commit is acknowledged that does not exist')
            n = self.attempts[sha(data)].n
            self.check(body == u64(n) + self.chain[n] + u64(self.times[n]),
                       'answer', 'not the first answer')
        elif kind == tarsnapd.ERROR:
            # CONFLICT is for ever; another refusal only if the commit was
            # there when it was asked for.
            code = CODE[struct.unpack_from('>H', body)[0]]
            self.world.stats[code] += 1
            self.check(code == 'INTERNAL' or not self.committed(data)
                       or code == 'NOMACHINE' and self.erased
                       or code != 'CONFLICT' and not link.done, 'answer',
                       '%s for a commit that exists: %s', code,
                       body[2:].decode())
            if code == 'CONFLICT':
                self.dead.append(self.attempts[sha(data)])

    # At the end.

    def check_dead(self):
        """What a client gave up never came to be."""
        for attempt in self.dead:
            self.check(not self.committed(attempt.raw), 'answer',
                       'commit %d was given up for dead', attempt.n)

    def check_index(self, index, whose):
        """An index that caught up says the same."""
        state = index.state()
        self.check(not state.lost, 'lost', 'the index of %s lacks %s', whose,
                   state.lost)
        self.check((state.k, state.log_hash, state.n, state.head or
                    self.chain[0]) == (self.k, self.log_hash,
                                       len(self.chain) - 1, self.chain[-1]),
                   'history', 'the index of %s stands elsewhere', whose)
        archives = {row[0]: row[1:4] for row in index.archives()}
        self.check(archives == self.archives, 'resurrected',
                   'the index of %s has other archives', whose)
        places = dict(zip(self.live, index.find(list(self.live))))
        for name, (key, offset) in self.live.items():
            self.check(places[name] and places[name][:2] == (key, offset),
                       'lost', 'the index of %s does not find %s', whose,
                       self.say(name))
        self.check(state.blocks == len(self.live), 'resurrected',
                   'the index of %s has more blocks', whose)

    def check_blocks(self):
        """Every live block is where it is said to be, with its bytes."""
        for name, (key, offset) in self.live.items():
            block = seal(self.labels[name])
            self.check(self.store.objects.get(key, b'')[
                offset:offset + len(block)] == block, 'lost',
                '%s is not in %s', self.say(name), key)


##############################################################################
# Scheduler
#
# Tasks are generators: sessions, cleaners, clients.  One step of a schedule
# carries out the wish of one task, or hands it what came of that.  Who is
# next, and what goes wrong, is drawn.
##############################################################################


class Task:
    """A generator under way."""

    def __init__(self, name, steps, server=None, process=''):
        self.name = name
        self.steps = steps
        self.server = server        # Server, None for a client
        self.process = process      # 'serve' or 'clean', of a server
        self.wish = None            # waits to be carried out
        self.value = self.error = None      # what came of the last one
        self.waits = None           # called; True when it can go on
        self.frozen = 0             # steps for which it is not looked at
        self.link = None            # of a session: its connection


class Lost(Exception):
    """The connection of a client broke."""


class Restart(Exception):
    """The walk must begin anew."""


class Died(Exception):
    """A client process ends here."""


class Refused(Exception):
    """A typed error; `code` is its name."""

    def __init__(self, body):
        self.code = CODE[struct.unpack_from('>H', body)[0]]
        super().__init__('%s: %s' % (self.code, body[2:].decode()))


class Link:
    """A connection: what a client has sent, what a session answers."""

    def __init__(self, world, server):
        self.world = world
        self.server = server
        self.requests = collections.deque()     # (name, body)
        self.answers = collections.deque()      # (type, asked, body)
        self.request = ()           # that the session works on
        self.done = False           # its commit existed when it came
        self.lost = False           # the client hears no more
        self.gone = False           # the server hears no more
        self.session = None
        world.spawn(Task('session', self.serve(), server, 'serve'),
                    link=self)

    def cut(self):
        """Break the connection, for both."""
        self.lost = self.gone = True
        self.answers.clear()
        self.requests.clear()

    def serve(self):
        """Steps of the server's side."""
        session = self.session = tarsnapd.Session(
            self.server, tarsnapd.TRANSPORT_TLS)
        yield from session.open()
        while not self.gone and not session.over:
            if self.requests and session.batch_bytes < 200:
                self.request = kind, body = self.requests.popleft()
                self.done = self.world.oracle.committed(body)
                if kind in rawclient.UNANSWERED:
                    error = session.accept(REQUEST[kind], body)
                    if error:
                        yield ('answer', tarsnapd.ERROR, error, 0)
                else:
                    yield from session.handle(REQUEST[kind], body)
                self.request = ()
            elif session.batch or session.unsaid:
                yield from session.idle()
            else:
                yield ('park', lambda: self.requests or self.gone
                       or session.unsaid)
        yield from session.end()
        self.lost = True

    # The client's side.

    def push(self, kind, body):
        """Send what has no answer."""
        if self.lost:
            raise Lost
        self.requests.append((kind, body))

    def ask(self, kind, body=b'', errors=False):
        """Steps: all answers to a request, as (name, body).

        With `errors`, ERROR is one of them, and only OK is the last.
        """
        self.push(kind, body)
        last = {'AUTH': 'AUTHOK', 'CHECKPOINT': 'COMMITTED',
                'COMMIT': 'COMMITTED', 'NUKE': 'COMMITTED',
                'HAS': 'BITMAP'}.get(kind, 'OK')
        out = []
        while True:
            yield ('park', lambda: self.answers or self.lost or (
                out and not (self.request or self.requests)))
            if not self.answers and self.lost:
                raise Lost
            if not self.answers:
                return out          # an error ended it
            number, asked, body = self.answers.popleft()
            name = rawclient.ANSWER[number]
            if name in ('RECEIVED', 'BUSY', 'STATEMENT'):
                continue
            if name == 'ERROR' and not (errors and asked):
                self.gone = self.gone or not asked
                raise Refused(body)
            out.append((name, body))
            if name == last:
                return out


class World:
    """One schedule.

    `mix` says who takes part, letters of ACTORS; `knobs` fix what else is
    drawn: how often what happens.
    """

    def __init__(self, seed, mix='', **knobs):
        self.seed = seed
        self.dice = random.Random(seed)
        self.clock = START
        self.oracle = Oracle(self)
        self.stats = collections.Counter()      # what happened
        self.store = self.oracle.store = Store(
            self.oracle, lambda: self.clock)
        self.servers = [Server('A'), Server('B')]
        self.tasks = []
        self.late = []              # wishes that are still on their way
        self.steps = 0
        self.trace = None           # list of lines, or None
        chance = self.dice.choice
        self.faults = chance((0, 0.01, 0.04))       # of a store verb
        self.cuts = chance((0, 0.01, 0.03))         # of an answer
        self.stalls = self.cuts / 10    # the same, in the middle of a request
        self.deaths = chance((0, 0, 0.005, 0.02))   # of a client's steps
        self.crashes = chance((0, 0, 0.001, 0.004))     # of servers
        self.thrown = chance((0, 0, 0, 0.005))      # of their indexes
        self.switch = chance((0.05, 0.2, 0.5))      # to another task
        self.freeze = chance((0, 0.02, 0.1))        # of one we switch from
        self.segment = chance((250, 3000))          # bytes, when it is full
        self.aborts = chance((0, 0, 0.1, 0.3))      # of transactions
        self.delay = chance((0, 0, 0, DAY))         # of deletes
        self.__dict__.update(knobs)
        self.machine = tarsnapd.Machine(MACHINE, {
            'name': 'model', 'user': '', 'keys': Keys.public.hex(),
            'delays': [[START - 9 * DAY, self.delay // DAY]]})
        for letter in mix or self.draw_mix():
            self.add(letter)

    def draw_mix(self):
        """Who takes part: letters of ACTORS."""
        mix = 'w' + self.dice.choice(('w', 'wp', 'p', 'pp', 'c', 'cp', 'wcp'))
        mix += self.dice.choice(('', 'k', 'k', 'kk'))
        return mix + ''.join(x for x in 'ruuet' if self.dice.random() < 0.2) \
            + self.dice.choice(('',) * 9 + ('n',)) \
            + self.dice.choice(('',) * 11 + ('x',))

    def add(self, letter):
        make = ACTORS[letter]
        self.spawn(Task(make.__name__, make(self, len(self.tasks))))

    def spawn(self, task, link=None):
        task.link = link
        self.tasks.append(task)

    def roll(self, chance):
        """True so often, of 1."""
        return chance and self.dice.random() < chance

    def one_of(self, things):
        """One of a list; faster than choice()."""
        return things[int(self.dice.random() * len(things))]

    def note(self, text, *values):
        if self.trace is not None:
            self.trace.append('%5d %s' % (self.steps, text % values))

    # Going on.

    def run(self):
        """The whole schedule; a Violation if there is one."""
        task = None
        while True:
            self.steps += 1
            if self.steps == STEPS:
                self.heal()
            elif self.steps > MOST_STEPS:
                raise Violation('stuck', ', '.join(
                    x.name for x in self.tasks))
            if self.late and self.dice.random() < 0.01:
                self.arrive()
            if self.crashes and self.dice.random() < self.crashes:
                self.crash(self.one_of(self.servers))
            if self.thrown and self.dice.random() < self.thrown:
                # It was found damaged, and those who work on make it anew.
                self.stats['indexes thrown away'] += 1
                self.one_of(self.servers).index = Index()
            if task is None or task not in self.tasks or task.waits and (
                    not task.waits()) or self.dice.random() < self.switch:
                if task and self.roll(self.freeze):
                    task.frozen = self.steps + self.dice.randrange(400)
                task = self.choose()
            if task is None:
                if not any(x.waits is None or x.waits() for x in self.tasks):
                    break
                continue            # all that could go on are frozen
            self.step(task)
        self.finish()

    def choose(self):
        """The next task, None if all that can go on are frozen."""
        ready = [x for x in self.tasks if x.frozen <= self.steps
                 and (x.waits is None or x.waits())]
        return self.one_of(ready) if ready else None

    def heal(self):
        """From now on nothing goes wrong any more, so that all can end."""
        self.faults = self.cuts = self.stalls = self.deaths = 0
        self.crashes = self.thrown = self.freeze = 0
        for task in self.tasks:
            task.frozen = 0

    def step(self, task):
        """Carry out the wish of a task, and mostly hand it what came of it.
        """
        if task.link and task.link.request and self.roll(self.stalls):
            # The client is gone; the server works on, perhaps much later.
            self.stats['connections cut'] += 1
            task.link.cut()
            task.frozen = self.steps + self.dice.choice((0, 300))
        if task.wish is not None:
            wish, task.wish = task.wish, None
            try:
                task.value = self.perform(task, wish)
            except (StoreError, tarsnapd.Refused) as e:
                task.error = e
            if task not in self.tasks or self.dice.random() < 0.15:
                return              # it will hear of it later
        self.advance(task)

    def advance(self, task):
        """Run a task up to a wish that takes time."""
        while True:
            value, error = task.value, task.error
            task.value = task.error = task.waits = None
            if task.server is None and self.roll(self.deaths):
                self.stats['deaths'] += 1
                error = Died()
            try:
                wish = task.steps.throw(error) if error else (
                    task.steps.send(value))
            except (StopIteration, Died):
                if task in self.tasks:
                    self.tasks.remove(task)
                return
            verb = wish[0]
            if verb == 'now':
                self.clock += self.one_of((0, 0, 0, 1, 60, DAY // 3))
                task.value = self.clock
            elif verb == 'random':
                task.value = self.dice.randbytes(wish[1])
            elif verb == 'room':
                task.value = 300        # bytes
            elif verb == 'log':
                self.note('%s logs: %s', task.server.name, wish[1])
            elif verb == 'answer':
                self.answer(task, wish)
            elif verb == 'park':
                task.waits = wish[1]
                return
            else:
                task.wish = wish
                return

    def answer(self, task, wish):
        link, asked = task.link, len(wish) < 4
        if link is None:
            return                  # of a command; nobody listens
        self.note('%s answers %s: %s %s', task.server.name,
                  link.request and link.request[0],
                  rawclient.ANSWER[wish[1]], wish[2][:40])
        if asked:
            self.oracle.answered(link, wish[1], wish[2])
        if self.roll(self.cuts):
            self.stats['connections cut'] += 1
            link.cut()
        if not link.lost:
            link.answers.append((wish[1], asked, wish[2]))

    # Carrying out.

    def perform(self, task, wish):
        verb = wish[0]
        if verb == 'all':
            return self.perform_all(task, wish[1])
        if verb in tarsnapd.STORE_VERBS:
            return self.perform_store(task, wish)
        if verb == 'index':
            try:
                return getattr(task.server.index, wish[2])(*wish[3:])
            except (sqlite3.Error, Damaged) as e:
                raise Violation('history', 'index: %s' % e) from e
        if verb == 'spool':
            return task.server.spool(task.process, wish)
        assert verb == 'wait', wish
        self.clock += 1
        return None

    def perform_all(self, task, wishes):
        """Several wishes, in any order."""
        values = [None] * len(wishes)
        for i in self.dice.sample(range(len(wishes)), len(wishes)):
            try:
                values[i] = self.perform(task, wishes[i])
            except StoreError as e:
                values[i] = e
        return values

    def perform_store(self, task, wish):
        """A verb of the store, as a store may do it."""
        if wish[0] in ('put', 'delete'):
            self.note('%s/%s %s %s', task.server.name, task.process, *wish[:2])
        if not self.roll(self.faults):
            return self.apply(wish)
        how = self.dice.choice(('before', 'after', 'later', 'twice', 'false'))
        self.note('   fault: %s', how)
        self.stats['faults'] += 1
        writes = wish[0] in ('put', 'delete')
        if how in ('after', 'twice', 'false'):
            value = self.apply(wish)
            if how == 'twice' and writes:
                self.late.append(wish)
                return value
            if how == 'false' and wish[0] == 'put':
                return False        # it was our own that was there already
        elif how == 'later' and writes:
            self.late.append(wish)
        raise StoreError(wish[0], wish[1], 'made to fail')

    def apply(self, wish):
        return getattr(self.store, wish[0])(*wish[1:])

    def arrive(self):
        """A request that was on its way for long is done now."""
        wish = self.late.pop(self.dice.randrange(len(self.late)))
        self.note('late: %s %s', *wish[:2])
        self.apply(wish)

    # What ends suddenly.

    def crash(self, server):
        """The processes of a server die, or only `serve`; it comes back."""
        whole = self.dice.random() < 0.5
        self.note('crash of %s', server.name)
        self.stats['crashes'] += 1
        for task in list(self.tasks):
            if task.server is server and (whole or task.process == 'serve'):
                self.tasks.remove(task)
                if task.link:
                    task.link.cut()
                self.leave(task.wish)
        server.open = {}
        server.shelf.locks = {tid: process for tid, process in
                              server.shelf.locks.items()
                              if process == 'clean' and not whole}
        lost = self.dice.random()
        if lost < 0.3:
            self.note('and its spool is lost')
            server.shelf.files.clear()
        if 0.2 < lost < 0.5 and whole:
            self.note('and its index is lost')
            server.index = Index()

    def leave(self, wish):
        """What a dead process had asked of the store may be done yet."""
        for one in wish[1] if wish and wish[0] == 'all' else [wish]:
            if one and one[0] in ('put', 'delete'):
                self.late.append(one)

    # The end.

    def finish(self):
        """All have ended: servers begin anew, and all is looked at."""
        if self.tasks:
            raise Violation('stuck', 'for ever: %s' % ', '.join(
                x.name for x in self.tasks))
        self.heal()
        while self.late:
            if self.dice.random() < 0.5:
                self.arrive()
            else:
                self.late.pop()
        self.oracle.check_blocks()
        self.oracle.check_dead()
        fresh = Server('rebuilt')
        for server in [fresh] + self.servers:
            self.caught_up(server)
            self.oracle.check_index(server.index, server.name)
        dump = fresh.index.dump()
        for server in self.servers:
            if server.index.dump() != dump:
                raise Violation('history', 'the index of %s is not what a '
                                'rebuild makes' % server.name)

    def caught_up(self, server):
        """Bring the index of a server to the end of the log."""
        task = Task('rebuild', tarsnapd.catch_up(MACHINE), server)
        self.tasks = [task]
        while self.tasks:
            try:
                self.step(task)
            except StoreError as e:
                raise Violation('history', 'no rebuild: %s' % e) from e


##############################################################################
# Clients
#
# A cache directory and who works with it.  They keep the rules in few words;
# where the real client keeps each is said in RULES.
##############################################################################


class Cache(rawclient.Host):
    """What a client remembers on its disk."""

    def __init__(self, world):
        self.world = world
        self.keys = Keys
        self.machine = MACHINE
        self.n, self.head = 0, world.oracle.chain[0]
        self.archives = {}          # id -> (record, lineage, state)
        self.names = set()          # live blocks
        self.pending = None         # sealed Attempt
        self.tid = None             # of a transaction under way
        self.lineage = bytes(16)    # of the last run
        self.runs = 0
        self.owner = ''

    def __deepcopy__(self, memo):
        other = Cache(self.world)
        other.__dict__.update({
            key: value.copy() if isinstance(value, (dict, set)) else value
            for key, value in self.__dict__.items()})
        return other

    def sign(self, kind, tid, lineage=bytes(16), **what):
        """An Attempt on top of what is remembered."""
        number = KINDS[kind]
        raw = self.build(tid, kind=number, sign={'undelete': D}.get(kind),
                         **what)
        attempt = Attempt(raw, number, tid, lineage, *(
            what.get(x, ()) for x in ('puts', 'deletes', 'linked',
                                      'unlinked')))
        self.world.oracle.attempts[attempt.hash] = attempt
        return attempt

    def apply(self, attempt):
        """Commit n + 1 is this one."""
        self.n, self.head = attempt.n, attempt.hash
        if attempt.kind == KINDS['nuke']:
            self.names.clear()
            self.archives.clear()
        self.names.update(attempt.puts)
        self.names -= attempt.deletes
        for archive, _ in attempt.unlinked:
            del self.archives[archive]
        for archive, *link in attempt.linked:
            self.archives[archive] = tuple(link)


class Actor:
    """One client process after another, over one cache."""

    roles = (W,)
    most = 6                        # processes

    def __init__(self, world, cache, name):
        self.world = world
        self.dice = world.dice
        self.oracle = world.oracle
        self.cache = cache
        self.name = name
        self.link = None
        cache.owner = name

    def life(self):
        """Steps: processes, until one has done its work."""
        for _ in range(self.most):
            self.cache.runs += 1
            try:
                yield from self.settle()
                yield from self.work()
                break
            except (Died, Lost, Refused) as e:
                self.world.note('%s: %s', self.name,
                                str(e) or type(e).__name__)
            finally:
                self.hang_up()

    def settle(self):
        """Steps: what a process that died left undecided."""
        return
        yield

    def linger(self, most):
        """Steps: do nothing for a while."""
        for _ in range(self.dice.randrange(most)):
            yield ('wait', 1)

    def hang_up(self):
        if self.link:
            self.link.lost = self.link.gone = True
            self.link = None

    # The server.

    def connect(self):
        """Steps: an authenticated Link, at any of the servers."""
        if self.link and not self.link.lost and not self.link.gone:
            return self.link
        seen = self.cache.n
        self.link = Link(self.world, self.dice.choice(self.world.servers))
        yield ('park', lambda: self.link.session and
               self.link.session.statement or self.link.lost)
        if self.link.lost:
            raise Lost
        for role in self.roles:
            session = self.link.session
            signed = (b'tarsnap-auth-1\0' + u16(1) + b'\x01' + STORE_ID
                      + bytes(32) + u64(MACHINE) + bytes([role])
                      + session.nonce + bytes(32))
            answer = yield from self.link.ask(
                'AUTH', struct.pack('>HQB', 1, MACHINE, role) + bytes(32)
                + Keys.private[role].sign(signed))
        n, = struct.unpack_from('>Q', answer[0][1])
        self.oracle.check(n >= seen, 'answer', 'the server shows commit %d, '
                          '%d was seen', n, seen)
        return self.link

    def retry(self, kind, body):
        """Steps: the answers to what may be asked again."""
        while True:
            try:
                link = yield from self.connect()
                return (yield from link.ask(kind, body))
            except Lost:
                continue

    def changes(self, n=None, head=None, lists=True):
        """Steps: the Attempts since a base; with `lists`, what the server says
        they put and deleted is looked at.
        """
        cache = self.cache
        if n is None:
            n, head = cache.n, cache.head
        answers = yield from self.retry('CHANGES', u64(n) + head
                                        + bytes([lists]))
        out, puts = [], {}
        for name, body in answers:
            if name == 'COMMIT_OBJECT':
                out.append(self.oracle.attempts[sha(body[8:])])
                puts[out[-1]] = [], []
                self.oracle.check(
                    (out[-1].n, out[-1].previous) == (n, head)
                    or out[-1].n == n + len(out), 'answer',
                    'CHANGES leaves out a commit')
            elif name == 'ADDED':
                puts[out[-1]][0].extend(x[0] for x in added([(name, body)]))
            elif name == 'REMOVED':
                puts[out[-1]][1].extend(rawclient.tarsnapd.split_names(
                    body[2:]))
        for attempt, (some, gone) in puts.items():
            self.oracle.check(
                not lists or some == attempt.puts
                and set(gone) == attempt.deletes,
                'answer', 'CHANGES says other lists than were signed')
        return out

    def catch_up(self):
        """Steps: apply what others committed; their Attempts."""
        changes = yield from self.changes()
        for attempt in changes:
            self.cache.apply(attempt)
        return changes

    def decided(self, attempt):
        """Steps: what became of an attempt: True, False, or None while that
        is open.  Commit n alone decides it.
        """
        changes = yield from self.changes(attempt.n - 1, attempt.previous,
                                          False)
        return self.judge(attempt, changes)

    def judge(self, attempt, changes):
        if not changes:
            return None
        return changes[0].hash == attempt.hash

    def believe(self, attempt, done):
        """The client takes it for committed, or for dead for ever."""
        self.oracle.check(self.oracle.committed(attempt.raw) == done,
                          'answer', '%s takes commit %d for %s', self.name,
                          attempt.n, 'done' if done else 'dead')
        if not done:
            self.oracle.dead.append(attempt)

    def begin(self, kind, tid, lineage=bytes(16)):
        """Steps: names that the transaction holds."""
        link = yield from self.connect()
        cache = self.cache
        answers = yield from link.ask('BEGIN', bytes([KINDS[kind]]) + tid
                                      + lineage + u64(cache.n) + cache.head
                                      + b'\0')
        return [row[0] for row in added(answers[1:])]


class Writer(Actor):
    """Stores archives, with checkpoints."""

    def __init__(self, world, cache, name):
        super().__init__(world, cache, name)
        self.todo = world.dice.choice((1, 1, 2))    # archives
        self.clear()

    def clear(self):
        self.own = {}               # name -> used by this walk
        self.order = []             # names put
        self.borrowed = set()       # names referred to and not put
        self.mine = set()           # names put before a checkpoint
        self.part = None            # (id, record) of the checkpoint

    def label(self, label):
        """The name of a block; the oracle learns what is in it."""
        self.oracle.labels[name_of(label)] = label
        return name_of(label)

    def settle(self):
        cache = self.cache
        if cache.pending:
            yield from self.settle_pending(cache.pending)
        yield from self.catch_up()
        yield from self.settle_parts()

    def settle_pending(self, attempt):
        """Steps: roll a dead run's commit forward, or declare it dead."""
        cache = self.cache
        found = cache.head == attempt.hash if cache.n >= attempt.n else None
        if found is None:
            found = yield from self.decided(attempt)
        if found is None:
            found = yield from self.send_again(attempt)
        if found is not None:
            self.believe(attempt, found)
            cache.pending, cache.tid = None, None

    def send_again(self, attempt):
        """Steps: an undecided commit is sent once more; if that is refused,
        an empty one takes its number.
        """
        while True:
            try:
                yield from self.begin('write', attempt.tid, attempt.lineage)
                yield from self.link.ask('COMMIT', attempt.raw)
                return True
            except Lost:
                found = yield from self.decided(attempt)
            except Refused:
                yield from self.abort()
                found = yield from self.decided(attempt)
                if found is None:
                    yield from self.take_number()
                    found = yield from self.decided(attempt)
            if found is not None:
                return found

    def abort(self):
        """Steps: give the transaction up, if this connection has it."""
        with contextlib.suppress(Lost, Refused):
            yield from self.link.ask('ABORT')
        self.hang_up()

    def take_number(self):
        """Steps: commit n + 1 is an empty one, or somebody else's."""
        abort = self.cache.sign('abort', self.dice.randbytes(16))
        with contextlib.suppress(Lost, Refused):
            link = yield from self.connect()
            yield from link.ask('COMMIT', abort.raw)

    def settle_parts(self):
        """Steps: a checkpoint that a dead run left is kept for good."""
        cache = self.cache
        for archive, row in list(cache.archives.items()):
            if row[1:] != (cache.lineage, OPEN):
                continue
            tid = self.dice.randbytes(16)
            attempt = cache.sign(
                'write', tid, row[1], unlinked=[(archive, row[0])],
                linked=[(archive, row[0], row[1], PARTIAL)])
            yield from self.begin('write', tid, row[1])
            yield from self.link.ask('COMMIT', attempt.raw)
            yield from self.catch_up()

    def work(self):
        while self.todo:
            yield from self.backup()
            self.todo -= 1
            yield from self.catch_up()

    def backup(self):
        """Steps: one archive; the walk begins anew when it must."""
        dice, cache = self.dice, self.cache
        self.clear()
        title = 'x%d' % dice.randrange(3)
        if name_of(title.encode()) in cache.archives:
            title += self.name + str(cache.runs)
        self.run = '%s.%d.%d' % (self.name, cache.runs, self.todo)
        pages = [''.join(dice.sample('vwxyz', dice.randrange(1, 3)))
                 for _ in range(dice.randrange(1, 4))]
        pages = sorted({''.join(sorted(page)) for page in pages})
        cache.tid = cache.tid or dice.randbytes(16)
        cache.lineage = self.lineage = dice.randbytes(16)
        cut = dice.randrange(len(pages)) if dice.random() < 0.4 else 0
        self.adopt((yield from self.begin('write', cache.tid, self.lineage)))
        if cut:
            yield from self.store(title + '.part', pages[:cut], OPEN)
        yield from self.store(title, pages, COMPLETE)
        cache.tid = None

    def adopt(self, held):
        """Own what the server holds; nothing of it is used yet."""
        self.own = dict.fromkeys(held, False)
        self.order = list(held)

    def store(self, title, pages, state):
        """Steps: walk, and commit, until it is decided."""
        walk = True
        while True:
            try:
                if walk:
                    self.walk(pages)
                walk = False
                if self.dice.random() < self.world.aborts:
                    yield from self.abort()
                    raise Lost
                walk = yield from self.commit(title, pages, state)
                if walk is None:
                    return
            except Lost:
                walk = (yield from self.resume()) or walk
            except Restart:
                walk = True

    def walk(self, pages):
        """Put what is not stored; note what is."""
        self.own = dict.fromkeys(self.own, False)
        self.borrowed = set()
        for page in pages:
            label = page_label(page)
            if self.has(label):
                continue
            for kid in kids_of(label):
                if not self.has(kid):
                    self.put(kid)
            self.put(label)

    def has(self, label):
        """True if the block need not be put.

        What was put before a checkpoint is borrowed like any other.
        """
        name = name_of(label)
        if self.own.get(name):
            return True
        if name in self.cache.names and name not in self.own:
            self.borrowed.add(name)
            return True
        return False

    def put(self, label):
        name = self.label(label)
        if name not in self.own:
            self.link.push('PUT', name + label[:1] + seal(label))
            self.order.append(name)
        self.own[name] = True

    def withdraw(self, names):
        self.link.push('WITHDRAW', names_body(names))
        for name in names:
            self.own.pop(name, None)
        self.order = [name for name in self.order if name not in names]

    def resume(self):
        """Steps: after a lost connection; True if the walk begins anew."""
        cache = self.cache
        while True:
            try:
                held = yield from self.begin('write', cache.tid, self.lineage)
                break
            except Lost:
                continue
        if held == self.order:
            return False
        self.adopt(held)
        return True

    def commit(self, title, pages, state):
        """Steps: None when the archive exists, else whether to walk."""
        cache = self.cache
        unused = [name for name, used in self.own.items() if not used]
        if unused:
            self.withdraw(unused)
        label = record_label(title, (cache.n, cache.head), self.run, pages)
        record = self.label(label)
        if not self.has(label):
            self.put(label)
        attempt = cache.sign(
            'write', cache.tid, self.lineage, puts=self.order,
            linked=[(name_of(title.encode()), record, self.lineage, state)],
            unlinked=[self.part] if self.part else ())
        cache.pending = attempt
        done = yield from self.send(attempt, 'CHECKPOINT' if state == OPEN
                                    else 'COMMIT')
        self.believe(attempt, done)
        cache.pending = None
        if not done:
            return (yield from self.rebase(record))
        cache.apply(attempt)
        self.own, self.order = {}, []
        self.part = attempt.linked[0][:2] if state == OPEN else None
        self.mine.update(attempt.puts)
        return None

    def send(self, attempt, frame):
        """Steps: True if it stands, False if it is dead."""
        while True:
            try:
                yield from self.link.ask(frame, attempt.raw)
                return True
            except Lost:
                found = yield from self.decided(attempt)
                if found is None:
                    found = yield from self.resume_commit(attempt)
            except Refused as e:
                if e.code != 'CONFLICT':
                    raise
                found = False
            if found is not None:
                return found

    def resume_commit(self, attempt):
        """Steps: take the transaction to another connection; as decided().
        """
        try:
            again = yield from self.resume()
        except Refused:
            again = True
        if not again:
            return None
        found = yield from self.decided(attempt)
        if not found:
            raise Restart
        return found

    def rebase(self, record):
        """Steps: go on from the newest commit; True if the walk must begin
        anew, because something that was borrowed is gone.
        """
        changes = yield from self.catch_up()
        if self.part and self.part[0] not in self.cache.archives:
            self.part = None        # somebody deleted it
        if self.link.lost and (yield from self.resume()):
            return True
        if record in self.own:
            self.withdraw([record])
        gone = set().union(*(x.deletes for x in changes))
        return self.meets(gone) or any(x.kind == KINDS['nuke']
                                       for x in changes)

    def meets(self, gone):
        """True if something borrowed was deleted."""
        return bool(self.borrowed & gone)


class Pruner(Actor):
    """Deletes archives; reads what blocks refer to."""

    roles = (D,)

    def __init__(self, world, cache, name):
        super().__init__(world, cache, name)
        self.todo = world.dice.choice((1, 2))
        self.labels = {}            # name -> label, of live index blocks

    def work(self):
        while self.todo:
            yield from self.catch_up()
            archives = sorted(self.cache.archives)
            if archives:
                yield from self.delete(self.dice.choice(archives))
            else:
                for _ in range(15):
                    yield ('wait', 1)
            self.todo -= 1

    def delete(self, archive):
        """Steps: an archive is gone; every attempt counts anew."""
        sent = None
        while True:
            for attempt in (yield from self.catch_up()):
                if sent and attempt.hash == sent.hash:
                    return
            yield from self.read_missing()
            if archive not in self.cache.archives:
                return
            sent = yield from self.delete_once(archive, sent)

    def delete_once(self, archive, before):
        """Steps: one attempt; `before` is the last, of which nothing is used.
        """
        cache, tid = self.cache, self.dice.randbytes(16)
        record = cache.archives[archive][0]
        dead = self.dead(record)
        attempt = cache.sign('delete', tid, deletes=dead,
                             unlinked=[(archive, record)])
        try:
            yield from self.begin('delete', tid)
            for name in sorted(dead):
                self.link.push('DELETE', names_body([name]))
            yield from self.link.ask('COMMIT', attempt.raw)
        except Lost:
            pass
        except Refused as e:
            if e.code not in ('CONFLICT', 'EXPIRED'):
                raise
            self.hang_up()
        return attempt

    def dead(self, record):
        """What ceases to exist with `record`: tarsnap.release()."""
        return set(tarsnap.release(Counts(self.cache, self.labels),
                                   [record])[0])

    def read_missing(self):
        """Steps: learn what live index blocks refer to."""
        while True:
            wanted = [name for name in sorted(self.cache.names)
                      if self.oracle.labels[name][:1] != b'c'
                      and name not in self.labels]
            if not wanted:
                return
            try:
                yield from self.read(wanted, 1)
            except Refused as e:
                if e.code != 'NOBLOCK' or not (yield from self.catch_up()):
                    raise

    def read(self, names, mask):
        """Steps: the labels of blocks; Refused for the first that fails."""
        born = dict(self.oracle.born)
        live = set(self.oracle.live)
        answers = yield from self.retry_get(bytes([mask]) + names_body(names))
        for name, (kind, body) in zip(names, answers):
            if kind == 'ERROR':
                error = Refused(body)
                self.oracle.check(
                    error.code != 'NOBLOCK' or name not in live
                    or name not in self.oracle.live
                    or born[name] != self.oracle.born[name], 'lost',
                    'the live block %s is said to be lost: %s',
                    self.oracle.say(name), error)
                raise error
            self.oracle.check(name_of(unseal(body[32:])) == name, 'lost',
                              'GET of %s answers %s', self.oracle.say(name),
                              body)
            self.labels[name] = unseal(body[32:])

    def retry_get(self, body):
        while True:
            try:
                link = yield from self.connect()
                return (yield from link.ask('GET', body, errors=True))
            except Lost:
                continue


class Counts:
    """A cache as far as tarsnap.release() looks into one."""

    Kid = collections.namedtuple('Kid', 'name')

    def __init__(self, cache, labels):
        self.below = {name: [name_of(x) for x in kids_of(labels[name])]
                      if name in labels else ()
                      for name in sorted(cache.names)}
        self.records = [row[0] for row in cache.archives.values()]
        self.counts = collections.Counter(
            kid for name in self.parents() for kid in set(self.below[name]))
        self.counts.update(self.records)
        self.db = self

    def parents(self):
        """All live blocks, also those that no archive reaches."""
        return self.below

    def reached(self):
        """Those that archives reach."""
        return {x for record in self.records for x in
                [record] + self.below[record]}

    def execute(self, sql):
        """Names that nothing refers to."""
        assert sql == 'SELECT name FROM blocks WHERE count = 0'
        return [(name,) for name in self.below if not self.counts[name]]

    def find(self, name):
        if name not in self.below:
            return None
        return 'i' if self.below[name] else 'c', self.counts[name], 0, 0

    def kids(self, name):
        return [self.Kid(kid) for kid in self.below[name]]


class Reader(Pruner):
    """Reads archives whole."""

    roles = (R,)
    most = 2

    def work(self):
        while self.todo:
            answers = yield from self.retry('LIST', u16(0))
            rows = []
            for name, body in answers:
                if name == 'ARCHIVES':
                    rows += [body[i:i + 32] + body[i + 32:i + 64] for i in
                             range(2, len(body), 89)]
            if rows:
                yield from self.extract(self.dice.choice(rows))
            self.todo -= 1

    def extract(self, row):
        """Steps: every block, from above."""
        level, self.labels = [row[32:]], {}
        while level:
            yield from self.read(level, 3)
            level = sorted({name_of(x) for name in level
                            for x in kids_of(self.labels[name])})


class Undeleter(Pruner):
    """Brings back what was deleted, if it is kept."""

    roles = (D,)

    def work(self):
        for _ in range(6):
            yield from self.linger(30)
            yield from self.catch_up()
            gone = yield from self.gone()
            if gone:
                yield from self.bring_back(*self.dice.choice(gone))
                return

    def gone(self):
        """Steps: [(archive, link)] deleted and not live."""
        archives, gone = {}, {}
        changes = yield from self.changes(0, self.oracle.chain[0], False)
        for attempt in changes:
            if attempt.kind == KINDS['nuke']:
                gone.update(archives)
                archives.clear()
            for archive, _ in attempt.unlinked:
                link = archives.pop(archive)
                if attempt.kind == KINDS['delete']:
                    gone[archive] = link
            for archive, *link in attempt.linked:
                archives[archive] = link
                gone.pop(archive, None)
        return sorted(gone.items())

    def bring_back(self, archive, link):
        cache, tid = self.cache, self.dice.randbytes(16)
        yield from self.catch_up()
        if archive in cache.archives:
            return
        yield from self.begin('delete', tid)
        names, level = [], [link[0]]
        while level:
            yield from self.link.ask('REVIVE', names_body(level))
            names += level
            index = [name for name in level
                     if self.oracle.labels[name][:1] != b'c']
            self.labels = {}
            if index:
                yield from self.read(index, 5)
            level = sorted({name_of(x) for name in index
                            for x in kids_of(self.labels[name])}
                           - cache.names - set(names))
        state = PARTIAL if link[2] == OPEN else link[2]
        attempt = cache.sign('undelete', tid, puts=names,
                             linked=[(archive, link[0], link[1], state)])
        yield from self.link.ask('COMMIT', attempt.raw)


class Nuker(Actor):
    """Deletes everything at once."""

    roles = (N,)
    most = 1

    def work(self):
        yield from self.linger(60)
        yield from self.catch_up()
        attempt = self.cache.sign('nuke', self.dice.randbytes(16))
        link = yield from self.connect()
        yield from link.ask('NUKE', attempt.raw)


class Eager(Actor):
    """Signs the next commit before it has heard of the first."""

    most = 1

    def work(self):
        yield from self.linger(40)
        yield from self.catch_up()
        link = yield from self.connect()
        first = self.cache.sign('abort', self.dice.randbytes(16))
        self.cache.apply(first)
        second = self.cache.sign('abort', self.dice.randbytes(16))
        link.push('COMMIT', first.raw)
        yield from link.ask('COMMIT', second.raw)


class Thief(Actor):
    """Has a write key and keeps no rule: what the server must refuse."""

    most = 3

    def work(self):
        yield from self.linger(60)
        yield from self.catch_up()
        cache, dice, tid = self.cache, self.dice, self.dice.randbytes(16)
        archive, row = name_of(self.name.encode()), None
        if cache.archives:
            archive = dice.choice(sorted(cache.archives))
            row = cache.archives[archive]
        lineage = dice.choice((row[1] if row else bytes(16), bytes(16)))
        yield from self.begin('write', tid, lineage)
        label = record_label('t', (cache.n, cache.head),
                             '%s.%d' % (self.name, cache.runs), [])
        record = name_of(label)
        self.oracle.labels[record] = label
        puts = [record]
        if dice.random() < 0.7:
            self.link.push('PUT', record + b'a' + seal(label))
        elif dice.random() < 0.5:
            puts = []
        attempt = cache.sign(
            'write', tid, lineage, puts=puts, linked=[
                (archive, record, bytes(16), COMPLETE)],
            unlinked=[(archive, row[0])] if row and dice.random() < 0.7
            else (), live=dice.choice((None, None, None, bytes(32))))
        yield from self.link.ask('COMMIT', attempt.raw)


def actor(cls):
    """What ACTORS has for a client: a function that makes its steps."""
    def make(world, number):
        return cls(world, Cache(world), '%s%d' % (
            cls.__name__[0].lower(), number)).life()
    make.__name__ = cls.__name__
    return make


def clone(world, number):
    """Steps: a writer whose disk is copied at some moment, and both go on."""
    original = Writer(world, Cache(world), 'w%d' % number)
    world.spawn(Task('Writer', original.life()))
    for _ in range(world.dice.randrange(80)):
        yield ('wait', 1)
    twin = Writer(world, copy.deepcopy(original.cache), 'v%d' % number)
    yield from twin.life()


def cleaner(world, number):
    """Steps: have rounds of cleaning done on servers, now and then."""
    dice = world.dice
    for _ in range(dice.randrange(1, 4)):
        for _ in range(dice.randrange(60)):
            yield ('wait', 1)
        server = dice.choice(world.servers)
        if server.cleaning in world.tasks:
            continue
        server.cleaning = Task('cleaner', clean(dice), server, 'clean')
        world.spawn(server.cleaning)


def clean(dice):
    """Steps: one round; half of them copy whatever there is."""
    policy = tarsnapd.Policy()
    policy.gain, policy.used = dice.choice(((1, 100), (-10 ** 6, 10 ** 6)))
    policy.merge = dice.choice((2, 3, 8))
    policy.sources = dice.choice((1, 3, 256))
    policy.dead = dice.choice((0, 100, 5000))
    policy.overtaken = policy.dead // 2
    policy.copies = dice.choice((0, 100, 5000))
    policy.abandon = dice.random() < 0.2
    with contextlib.suppress(StoreError):
        yield from tarsnapd.clean(MACHINE, policy, tarsnapd.Cleaned())


def eraser(world, number):
    """Steps: the operator erases everything, and cleans until that is done."""
    dice = world.dice
    for _ in range(dice.randrange(200)):
        yield ('wait', 1)
    for _ in range(4):
        task = Task('eraser', erase(dice), dice.choice(world.servers), 'clean')
        world.spawn(task)
        while task in world.tasks:
            yield ('wait', 1)


def erase(dice):
    """Steps: what `tarsnapd machine erase` does, of a machine."""
    with contextlib.suppress(StoreError, tarsnapd.Refused):
        yield from tarsnapd.erase(MACHINE, 'a reason')
        yield from tarsnapd.clean(MACHINE, tarsnapd.Policy(),
                                  tarsnapd.Cleaned())


ACTORS = {'w': actor(Writer), 'p': actor(Pruner), 'r': actor(Reader),
          'u': actor(Undeleter), 'n': actor(Nuker), 'e': actor(Eager),
          't': actor(Thief), 'c': clone, 'k': cleaner, 'x': eraser}


##############################################################################
# Exploring
##############################################################################


@contextlib.contextmanager
def surroundings():
    """What of tarsnapd.py is another here: files, signatures, limits.

    Who may log in, and quotas, have nothing to do with what is checked.
    """
    def quotas(machine):
        return []
        yield

    with mock.patch.multiple(
            tarsnapd, verify=verify, write_all=memory_write,
            read_range=memory_read, quotas=quotas, Tables=Tables,
            Listed=Listed):
        yield


def explore(seed, mix='', trace=None, **knobs):
    """Run one schedule; its World.  A Violation if there is one."""
    world = World(seed, mix, **knobs)
    world.trace = trace

    def machine_load(number):
        return world.machine
        yield

    with mock.patch.object(tarsnapd, 'machine_load', machine_load), \
            mock.patch.dict(tarsnapd.LIMIT, {'segment': world.segment}):
        try:
            world.run()
        except (ArithmeticError, AssertionError, LookupError, TypeError,
                ValueError, AttributeError) as e:
            raise Violation('bug', '%s: %s' % (type(e).__name__, e)) from e
    return world


def violation(seed, mix='', **knobs):
    """The Violation of a schedule, or None."""
    try:
        explore(seed, mix, **knobs)
    except Violation as e:
        return e
    return None


##############################################################################
# Rules
#
# Each can be switched off: in the function that keeps it a piece of the source
# is replaced.  So a rule is nothing but that piece, and a function that was
# changed says so here.
##############################################################################


class Rule:
    """A rule of tarsnap-commits(7), and how to do without.

    `edits`: (owner, function, what stands there, what takes its place).
    `mix`: who shows it; `seed`: a schedule in which that is seen.
    """

    def __init__(self, name, lemma, mix, seed, *edits, **knobs):
        self.name = name
        self.lemma = lemma
        self.mix = mix
        self.seed = seed
        self.edits = edits
        self.knobs = knobs

    @contextlib.contextmanager
    def off(self):
        """Without it."""
        with contextlib.ExitStack() as stack:
            for owner, name, old, new in self.edits:
                stack.enter_context(mock.patch.object(
                    owner, name, edited(owner, name, old, new)))
            yield

    def search(self, seeds):
        """(seed, Violation) of the first schedule that shows it, or None."""
        with surroundings(), self.off():
            for seed in seeds:
                found = violation(seed, self.mix, **self.knobs)
                if found:
                    return seed, found
        return None


def edited(owner, name, old, new):
    """A function of a class or module with a piece of its source replaced."""
    member = inspect.getattr_static(owner, name)
    source = textwrap.dedent(inspect.getsource(
        getattr(member, '__func__', member)))
    if source.count(old) != 1:
        raise AssertionError('%s: "%s" stands there %d times' % (
            name, old, source.count(old)))
    module = owner if inspect.ismodule(owner) else (
        sys.modules[owner.__module__])
    made = {}
    exec(compile(source.replace(old, new), 'edited ' + name, 'exec'),
         vars(module), made)
    return made[name]


SESSION = tarsnapd.Session
RULES = [
    Rule('base', 'order', 'eeeew', 2, (
        SESSION, '_decide',
        'if commit.previous != (state.head or self.genesis):', 'if False:')),
    Rule('absent', 'order', 'wwp', 2, (
        Store, 'absent', 'return key not in self.objects',
        "return key not in self.objects or key.startswith('log/')")),
    Rule('signed live', 'order', 'wtt', 12, (
        tarsnapd, 'check_live', 'if commit.live != live_digest(rows):',
        'if False:')),
    Rule('own numbers', 'order', 'wpk', 16, (
        tarsnapd.Index, '_apply_entry', 'n, head = state.n, state.head',
        'n, head = state.n + (commit is None), state.head')),
    Rule('current', 'order', 'wwp', 13, (
        SESSION, '_current', 'yield from catch_up(self.machine.number)',
        "yield self._ask('state')")),
    Rule('index that knows', 'order', 'wwc', 201, (
        tarsnapd.Index, 'at', '< k:', '< 0:'), thrown=0.1, crashes=0,
        cuts=0.1),
    Rule('first answer', 'decision', 'wwc', 101, (
        SESSION, '_decided', 'if not found or found[0] != commit.hash:',
        'if True:')),
    Rule('same body', 'decision', 'wc', 1, (
        SESSION, '_decided', 'if not found or found[0] != commit.hash:',
        'if not found:')),
    Rule('unclear put', 'decision', 'ww', 130, (
        tarsnapd, 'log_put',
        "except StoreError:\n        created = yield ('put', key, data)",
        'except StoreError:\n        created = True')),
    Rule('compare', 'decision', 'wwp', 2, (
        tarsnapd, 'log_put', "or (yield ('get', key, 0, None)) == data",
        "or (yield ('get', key, 0, None)) is not None")),
    Rule('undecided', 'decision', 'ww', 111, (
        Actor, 'judge', 'return None', 'return False')),
    Rule('that number', 'decision', 'wwp', 6, (
        Actor, 'judge', 'changes[0].hash', 'changes[-1].hash')),
    Rule('take the number', 'decision', 'ww', 411, (
        Writer, 'send_again', 'yield from self.take_number()\n'
        '                found = yield from self.decided(attempt)',
        'found = False'), stalls=0.1, deaths=0.05, cuts=0.01, switch=0.5,
        faults=0, crashes=0, thrown=0),
    Rule('borrowed', 'closure', 'wpp', 77, (
        Writer, 'meets', 'return bool(self.borrowed & gone)',
        'return False')),
    Rule('own after a checkpoint', 'closure', 'wwpp', 2, (
        Writer, 'has', 'self.borrowed.add(name)',
        'self.borrowed.update({name} - self.mine)')),
    Rule('delete anew', 'closure', 'wwpp', 32, (
        Pruner, 'delete_once', 'dead = self.dead(record)',
        'dead = before.deletes if before else self.dead(record)')),
    Rule('closed downward', 'closure', 'wwpp', 35, (
        Counts, 'parents', 'return self.below', 'return self.reached()'), (
        tarsnap, 'release', '((garbage, False), (records, True))',
        '((records, True),)')),
    Rule('count of puts', 'closure', 'wwkkk', 243, (
        tarsnapd, 'check_puts',
        'if change.commit.puts != (count, digest.digest()):',
        'if False:'), deaths=0.03),
    Rule('record', 'closure', 'wtt', 1, (
        tarsnapd, 'check_records',
        'missing = {x[1] for x in change.commit.linked}',
        'missing = set()')),
    Rule('drop before an abort deletes', 'copies', 'wwc', 223, (
        SESSION, '_abort', 'yield from log_drop(self.machine.number,\n',
        '(lambda _, keys: keys)(self.machine.number,\n')),
    Rule('drop before a cleaner deletes', 'copies', 'wwk', 3, (
        tarsnapd, 'clean_orphans',
        'dropped = yield from log_drop(machine, keys)',
        "dropped = keys\n        for key in keys:\n"
        "            yield ('delete', key)")),
    Rule('drop only what is not committed', 'copies', 'wwk', 65, (
        tarsnapd, 'log_drop',
        'keys = yield from droppable(machine, state.k, keys)', 'pass')),
    Rule('expired', 'copies', 'wwkk', 31, (
        SESSION, '_segments_ready',
        'if len((yield from droppable(number, k, adopted))) < len(adopted):',
        'if False:')),
    Rule('losing cleaner recomputes', 'copies', 'wwppkkk', 22, (
        tarsnapd, 'clean_commit',
        'if (yield from log_put(entry)):\n            break',
        'while not (yield from log_put(entry)):\n'
        '            state = yield from catch_up(machine)\n'
        '            entry.k, entry.previous = state.k + 1, state.log_hash\n'
        '            entry.blocks, entry.bytes = state.blocks, state.bytes\n'
        '            entry.time = max(entry.time, state.time)\n'
        '        break'), switch=0.5, freeze=0.1),
    Rule('losing commit recomputes', 'copies', 'wwp', 2, (
        SESSION, '_decide', 'if entry and (yield from log_put(entry)):',
        'while entry and not (yield from log_put(entry)):\n'
        '            state = yield from self._current()\n'
        '            entry.k, entry.previous = state.k + 1, state.log_hash\n'
        '        if entry:')),
    Rule('drop what is copied whole', 'copies', 'wpuuukkk', 211, (
        tarsnapd.Index, '_check_move',
        'empty = {seg for seg in left if left[seg][1] == 0}',
        'empty = set(left)'), switch=0.5, freeze=0.1, delay=0, deaths=0,
        faults=0, crashes=0, cuts=0, stalls=0, thrown=0),
    Rule('extract', 'copies', 'wpkkk', 3, (
        tarsnapd, 'clean_copy', 'if extract_key(key):', 'if False:')),
    Rule('content in the key', 'copies', 'wwc', 33, (
        tarsnapd, 'segment_key', 'table_hash[:16].hex()', "''")),
    Rule('reader looks again', 'reading', 'wrkk', 77, (
        SESSION, '_read', 'yield from self._read_again(names[i], places[i])',
        "Refused(E_NOBLOCK, 'not there')")),
    Rule('exists', 'archives', 'wwc', 3, (
        tarsnapd, 'check_archives', 'if archive in archives:', 'if False:')),
    Rule('lineage', 'archives', 'wctt', 113, (
        tarsnapd, 'check_unlink', 'if state == OPEN and owner == lineage:',
        'if state == OPEN:')),
    Rule('kept part', 'archives', 'wctt', 1, (
        tarsnapd, 'check_unlink', 'if state == OPEN and owner == lineage:',
        'if owner == lineage:')),
    Rule('delete delay', 'undelete', 'wpkk', 69, (
        tarsnapd, 'kept_since',
        'now + 1 - delete_delay(found.delays if found else [], now)',
        'now + 1')),
    Rule('revive what is kept', 'undelete', 'wppuukk', 22, (
        tarsnapd.Index, 'find', "'AND s.dropped = 0'", "''"), (
        tarsnapd.Index, 'stranded', 'WHERE ? = (SELECT k FROM meta)',
        'WHERE ? < 0'), delay=0, deaths=0, faults=0, crashes=0, cuts=0,
        stalls=0, thrown=0),
    Rule('drop what is erased', 'erasure', 'wwpx', 4, (
        tarsnapd, 'clean_erased',
        'yield from log_drop(machine, sorted(same))', 'pass')),
    Rule('last word', 'erasure', 'wwx', 4, (
        tarsnapd, 'erased_check', 'if state.erased:', 'if False:')),
]


##############################################################################
# Command line
##############################################################################


def share(first, step, count, until, out):
    """Explore every `step`-th seed from `first` on, `count` in all or up to
    the time `until`; one report into queue `out`, and each violation.
    """
    stats = collections.Counter()
    with surroundings():
        for seed in range(first, first + step * count, step):
            if time.monotonic() > until:
                break
            stats['schedules'] += 1
            try:
                world = explore(seed)
            except Violation as e:
                out.put((seed, str(e)))
                continue
            stats.update(world.stats, steps=world.steps)
    out.put(stats)


def explore_all(args):
    """Explore with several processes; exit status."""
    start = time.monotonic()
    until = start + args.seconds if args.seconds else float('inf')
    count = -(-args.count // args.jobs) if args.count else 1 << 60
    fork = multiprocessing.get_context('fork')
    out = fork.Queue()
    workers = [fork.Process(target=share, args=(
        args.seed + i, args.jobs, count, until, out))
        for i in range(args.jobs)]
    for worker in workers:
        worker.start()
    stats, bad, left = collections.Counter(), 0, len(workers)
    while left:
        found = out.get()
        if isinstance(found, tuple):
            bad += 1
            if bad <= 20:
                print('seed %d: %s' % found, flush=True)
        else:
            stats += found
            left -= 1
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - start
    schedules, steps = stats.pop('schedules', 0), stats.pop('steps', 0)
    print(', '.join('%s %d' % pair for pair in sorted(stats.items())))
    print('seeds from %d on: %d schedules, %d steps, %.0f seconds, %.0f '
          'schedules/s, %d violations' % (args.seed, schedules, steps, seconds,
                                          schedules / seconds, bad))
    return 1 if bad or not schedules else 0


def replay(seed):
    """Print what happens in one schedule; exit status."""
    trace = []
    with surroundings():
        found = violation(seed, trace=trace)
    print('\n'.join(trace))
    print('seed %d: %s' % (seed, found or 'nothing is wrong'))
    return 1 if found else 0


def rule_show(args):
    """Find a schedule that shows that a rule is needed; exit status."""
    rule = {rule.name: rule for rule in RULES}.get(args.off)
    if rule is None:
        sys.exit('no such rule: %s; --list shows them' % args.off)
    count = args.count or 10000
    found = rule.search(range(args.seed, args.seed + count))
    print('without "%s": %s' % (rule.name, 'seed %d: %s' % found if found
                                else 'nothing in %d schedules' % count))
    return 0 if found else 1


def main():
    parser = argparse.ArgumentParser(
        description='Explores schedules of two servers and their clients.')
    parser.add_argument('--seed', type=int, metavar='N', help='the first seed '
                        '(default: drawn)')
    parser.add_argument('--count', type=int, metavar='N', help='schedules')
    parser.add_argument('--seconds', type=float, metavar='N', help='at most '
                        '(default 60, without --count)')
    parser.add_argument('--jobs', type=int, metavar='N', default=2,
                        help='processes (default 2)')
    parser.add_argument('--off', metavar='RULE', help='without this rule')
    parser.add_argument('--replay', type=int, metavar='SEED',
                        help='say what happens in one schedule')
    parser.add_argument('--list', action='store_true', help='list the rules')
    args = parser.parse_args()
    if args.list:
        for rule in RULES:
            print('%-32s %s' % (rule.name, rule.lemma))
        return 0
    if args.replay is not None:
        return replay(args.replay)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10 ** 9)
    if args.off:
        return rule_show(args)
    if not args.count and not args.seconds:
        args.seconds = 60
    return explore_all(args)


if __name__ == '__main__':
    sys.exit(main())
