# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A server that lies is caught, or does no harm.

Between the client and an honest embedded store stands a liar.  Whatever it
does, the client either ends with a status other than 0 and one line that says
what is wrong, or what it stores and restores is right.
"""

import contextlib
import itertools
import os
import shutil
import struct
import time
import tracemalloc
import unittest
from unittest import mock

import lab
import tarsnap
from lab import R, W, LabTest, snapshot

U16 = struct.Struct('>H')
U64 = struct.Struct('>Q')


def rows(body, size):
    return [body[at:at + size] for at in range(2, len(body), size)]


def join(rows_):
    return U16.pack(len(rows_)) + b''.join(rows_)


class Liar(LabTest):
    def setUp(self):
        super().setUp()
        for number in range(8):
            self.write('d/f%d' % number, b'%d' % number * 40000)
        self.write('small', b'small')
        self.model = snapshot(self.lab.tree)

    def caught(self, words, lie, *args, host=None, cache=False,
               statement=None):
        """The client must notice, in these words."""
        with lab.tapped(lie, statement) as log:
            result = (host or self.host).run(*args, cache=cache)
        self.assertNotEqual(result.status, 0, result)
        self.assertIn(words, result.err)
        self.assertNotIn('Traceback', result.err)
        return log

    def extracting(self, name='one'):
        target = self.lab.fresh()
        os.mkdir(target)
        return ('-x', '-f', name, '-C', target)

    def creating(self, name):
        return ('-c', '-f', name, '-C', self.lab.tree, '.')

    def blocks(self, change):
        """A liar about the blocks of whole GETs: change(list of bodies)."""
        def lie(kind, rid, body, answers):
            if kind != tarsnap.GET:
                return answers
            places = [number for number, answer in enumerate(answers)
                      if answer[0] == tarsnap.BLOCK]
            bodies = change([answers[number][2] for number in places])
            for number, new in zip(places, bodies):
                answers[number] = (tarsnap.BLOCK, answers[number][1], new) \
                    if new is not None else (
                        tarsnap.ERROR, answers[number][1],
                        U16.pack(tarsnap.E_NOBLOCK) + b'no such block')
            return answers
        return lie

    def classes(self, bodies):
        """class -> numbers of the bodies of that class."""
        out = {}
        for number, body in enumerate(bodies):
            out.setdefault(body[33:34], []).append(number)
        return out


class Blocks(Liar):
    """Every block read is what its name says, or is not used."""

    def setUp(self):
        super().setUp()
        self.host.create('one')
        self.write('other', b'other')
        self.host.create('two')
        self.stock = {}                 # name -> whole block

        def keep(bodies):
            self.stock.update((body[:32], body[32:]) for body in bodies)
            return bodies

        with lab.tapped(self.blocks(keep)):
            for name in ('one', 'two'):
                self.assertEqual(self.host.run(*self.extracting(name),
                                               cache=False).status, 0)

    def of(self, cls, but=None):
        return [name for name, block in sorted(self.stock.items())
                if block[1:2] == cls and name != but]

    def each(self, cls, words, change):
        """Change each block of a class, one at a time."""
        names = self.of(cls)
        self.assertTrue(names)
        for victim in names:
            done = []

            def one(bodies, victim=victim, done=done):
                out = []
                for body in bodies:
                    if body[:32] == victim:
                        done.append(victim)
                        new = change(victim, body[32:])
                        body = None if new is None else new if len(
                            new) and new[:32] in self.stock else body[:32] \
                            + new
                    out.append(body)
                return out

            with lab.tapped(self.blocks(one)):
                result = self.host.run(*self.extracting('two'), cache=False)
            if done:
                self.assertEqual(result.status, 1, result)
                self.assertIn(words, result.err)

    def test_bit_flipped(self):
        for cls in (b'c', b'i', b'a'):
            for at in (2, 20, 40, 50, 60, -1, -17):
                def flip(name, block, at=at):
                    block = bytearray(block)
                    block[at] ^= 4
                    return bytes(block)
                self.each(cls, '', flip)

    def test_truncated(self):
        for cls in (b'c', b'i', b'a'):
            for length in (0, 10, 36, 60):
                self.each(cls, 'block', lambda name, block: block[:length])
            self.each(cls, 'block', lambda name, block: block[:-1])
            self.each(cls, 'block', lambda name, block: block + b'\0')

    def test_omitted(self):
        for cls in (b'c', b'i', b'a'):
            self.each(cls, 'missing', lambda name, block: None)

    def test_another_of_the_same_class(self):
        for cls in (b'c', b'i', b'a'):
            others = {name: self.of(cls, name)[0] for name in self.of(cls)
                      if self.of(cls, name)}
            self.each(cls, 'seal is broken',
                      lambda name, block: self.stock[others[name]])
            # With its own name on it, in place of the one asked for.
            self.each(cls, 'another block in its place', lambda name, block:
                      others[name] + self.stock[others[name]])

    def test_two_swapped(self):
        def swap(bodies):
            for numbers in self.classes(bodies).values():
                if len(numbers) > 1:
                    a, b = numbers[:2]
                    bodies[a], bodies[b] = bodies[b], bodies[a]
            return bodies
        self.caught('another block in its place', self.blocks(swap),
                    *self.extracting())

    def test_parts_of_two_pages_swapped(self):
        """Refs of one page, rows of another."""
        pages = self.of(b'i')
        self.assertGreater(len(pages), 1)

        def parts(block):
            length, = struct.unpack_from('>I', block, 36)
            return block[:40 + length], block[40 + length:]

        def mix(which):
            def change(name, block):
                other = self.stock[pages[0] if name != pages[0]
                                   else pages[1]]
                return parts(block)[0] + parts(other)[1] if which \
                    else parts(other)[0] + parts(block)[1]
            return change
        self.each(b'i', 'seal is broken', mix(True))
        self.each(b'i', 'seal is broken', mix(False))

    def test_resealed_by_a_stranger(self):
        """Who knows the public keys and no secret cannot make a block."""
        stranger = tarsnap.key_make('', '')
        for field in ('machine', 'data_pub', 'refs_pub'):
            setattr(stranger, field, getattr(self.lab.key, field))
        sealer = tarsnap.Sealer(stranger)
        self.each(b'c', 'seal is broken', lambda name, block: sealer.seal(
            b'c', name, [b'forged']))

    def test_resealed_by_the_write_key(self):
        """Other content under a name: sealed right, and not its name's."""
        sealer = tarsnap.Sealer(self.lab.key.subset({W}))
        opener = tarsnap.Opener(self.lab.key)

        def reseal(name, block):
            data = bytearray(opener.open(b'c', name, block)[0])
            data[0] ^= 1
            return sealer.seal(b'c', name, [bytes(data)])
        self.each(b'c', 'not what its name says', reseal)

        def longer(name, block):
            return sealer.seal(b'c', name, opener.open(
                b'c', name, block)[0:1] and [b'x'])
        self.each(b'c', '', longer)

        def rows_(name, block):
            refs, plain = opener.open(b'i', name, block)
            return sealer.seal(b'i', name, [refs, plain[:-1] + b'?'])
        self.each(b'i', 'rows are not those', rows_)

    def test_without_the_names_other_content_would_pass(self):
        """Why the name is compared although the seal is whole."""
        sealer = tarsnap.Sealer(self.lab.key.subset({W}))
        opener = tarsnap.Opener(self.lab.key)

        def reseal(bodies):
            return [body[:32] + sealer.seal(b'c', body[:32], [b'\xff' * len(
                opener.open(b'c', body[:32], body[32:])[0])])
                if body[33:34] == b'c' else body for body in bodies]

        args = self.extracting()
        with mock.patch.object(tarsnap.hmac, 'compare_digest',
                               lambda a, b: True), \
                lab.tapped(self.blocks(reseal)):
            self.assertEqual(self.host.run(*args, cache=False).status, 0)
        self.assertNotEqual(lab.difference(self.model, snapshot(args[-1])),
                            [])

    def test_nothing_wrong_is_left_in_a_file(self):
        """A damaged chunk: its file is reported, the others are whole."""
        victim = self.of(b'c')[0]
        args = self.extracting('two')
        model = snapshot(self.lab.tree)

        def one(bodies):
            return [body[:-1] + bytes([body[-1] ^ 1])
                    if body[:32] == victim else body for body in bodies]

        with lab.tapped(self.blocks(one)):
            result = self.host.run(*args, cache=False)
        self.assertEqual(result.status, 1)
        for path, row in snapshot(args[-1]).items():
            if 'content' in row and row['content'] != model[path][
                    'content']:
                self.assertIn(os.fsdecode(path), result.err)

    def test_blocks_left_out_altogether(self):
        def lie(kind, rid, body, answers):
            return answers if kind != tarsnap.GET else [
                answer for answer in answers if answer[0] != tarsnap.BLOCK]
        self.caught('left out by the server', lie, *self.extracting())

    def test_blocks_nobody_asked_for(self):
        """More answers than were asked for change nothing."""
        def lie(kind, rid, body, answers):
            if kind == tarsnap.GET:
                answers = answers[:-1] + answers[:1] + answers[-1:]
            return answers + [(tarsnap.BLOCK, 9999, bytes(40)),
                              (tarsnap.OK, 7777, b'')]
        args = self.extracting()
        with lab.tapped(lie):
            result = self.host.run(*args, cache=False)
        if result.status == 0:
            self.assertEqual(lab.difference(self.model, snapshot(args[-1])),
                             [])


class History(Liar):
    """Old states, forks, what is hidden and what is revived."""

    def setUp(self):
        super().setUp()
        self.host.create('one')
        self.lab.save('old')
        self.write('new', b'new')
        self.host.create('two')
        self.head = self.host.good('--print-head', cache=False).out.strip()

    READING = (('--list-archives',), ('-t', '-f', 'one'),
               ('-r', '-f', 'one'), ('--print-head',))

    def test_old_state_is_caught_with_a_cachedir(self):
        """By itself, in all modes, reading ones too."""
        self.lab.swap('old')
        for args in self.READING + (self.creating('three'),
                                    ('-d', '-f', 'one'), ('--fsck',),
                                    self.extracting()):
            result = self.host.run(*args)
            self.assertEqual(result.status, 1, (args, result))
            self.assertRegex(result.err, 'rolled back|hides|older')
        self.lab.swap('old')
        self.host.create('three')

    def test_old_state_on_a_bare_machine(self):
        """It cannot know, without --expect-head; with it it does."""
        self.lab.swap('old')
        for args in self.READING[:3] + (self.extracting(),):
            result = self.host.run(*args, cache=False)
            self.assertEqual(result.status, 0, result)
            args = args[:1] + ('--expect-head', self.head) + args[1:]
            result = self.host.run(*args, cache=False)
            self.assertEqual(result.status, 1)
            self.assertIn('hides the newest archives', result.err)
        self.lab.swap('old')
        for args in self.READING[:3]:
            args = args[:1] + ('--expect-head', self.head) + args[1:]
            self.host.good(*args, cache=False)
        # A later state is a continuation and fine.
        self.host.create('three')
        self.host.good('--list-archives', '--expect-head', self.head,
                       cache=False)

    def test_expect_head_of_another_history(self):
        wrong = self.head[:-1] + ('0' if self.head[-1] != '0' else '1')
        self.caught('forked', None, '--list-archives', '--expect-head',
                    wrong)

    def test_fork(self):
        """The copy goes on with another archive: same number, another
        history.
        """
        self.lab.swap('old')
        other = self.lab.host('b')
        other.good('--fsck')
        other.create('another two')
        for args in self.READING + (self.creating('three'),
                                    ('-d', '-f', 'one')):
            result = self.host.run(*args)
            self.assertEqual(result.status, 1, (args, result))
            self.assertRegex(result.err,
                             'does not know commit|does not continue|fork')
        self.caught('forked', None, '--list-archives', '--expect-head',
                    self.head)
        # And a longer fork.
        other.create('another three')
        other.create('another four')
        for args in self.READING:
            result = self.host.run(*args)
            self.assertEqual(result.status, 1, (args, result))
        # The other way round: back to the first history.
        self.lab.swap('old')
        result = other.run('--list-archives')
        self.assertEqual(result.status, 1)

    def test_rollback_accepted_on_purpose(self):
        self.lab.swap('old')
        self.assertEqual(self.host.run('--fsck').status, 1)
        self.host.good('--fsck', '--accept-rollback')
        self.host.create('two again')
        self.host.check('two again', snapshot(self.lab.tree))

    def listing(self, change):
        """A liar about LIST's rows."""
        def lie(kind, rid, body, answers):
            return [(answer[0], answer[1], join(change(rows(answer[2], 89))))
                    if answer[0] == tarsnap.ARCHIVES else answer
                    for answer in answers]
        return lie

    def test_list_hides_adds_swaps(self):
        def swap(found):
            return [found[0][:32] + found[1][32:64] + found[0][64:],
                    found[1][:32] + found[0][32:64] + found[1][64:]]

        def partial(found):
            return [row[:80] + b'\x02' + row[81:] for row in found]

        lies = [lambda found: found[1:], lambda found: found[:1],
                lambda found: [], lambda found: found + [bytes(80) + b'\x03'
                                                         + bytes(8)],
                swap, partial]
        for number, lie in enumerate(lies):
            for args in (('--list-archives',), ('-t', '-f', 'two')):
                with self.subTest(lie=number):
                    self.caught('hides, adds or swaps archives',
                                self.listing(lie), *args)

    def test_list_revives_a_deleted_one(self):
        kept = []

        def keep(found):
            kept[:] = found
            return found

        with lab.tapped(self.listing(keep)):
            self.host.good('--list-archives', cache=False)
        self.host.good('-d', '-f', 'one')
        self.caught('hides, adds or swaps', self.listing(lambda found: kept),
                    '--list-archives')

    def test_receive_times_are_the_servers_word(self):
        """They are not signed; nothing read or written depends on them."""
        def later(found):
            return [row[:81] + U64.pack(4 * 10 ** 9) for row in found]
        with lab.tapped(self.listing(later)):
            self.host.good('--list-archives', cache=False)
        model = snapshot(self.lab.tree)

        def lie(kind, rid, body, answers):
            return [(a[0], a[1], a[2][:40] + U64.pack(9)) if a[0] ==
                    tarsnap.COMMITTED else (a[0], a[1], U64.pack(7) + a[2][
                        8:]) if a[0] == tarsnap.COMMIT_OBJECT else a
                    for a in answers]
        with lab.tapped(lie):
            self.host.create('three')
        self.host.check('three', model)

    def commits(self, change):
        """A liar about commit objects (receive time || C_n)."""
        def lie(kind, rid, body, answers):
            out = []
            for answer in answers:
                if answer[0] == tarsnap.COMMIT_OBJECT:
                    new = change(kind, answer[2])
                    if new is None:
                        continue
                    answer = (answer[0], answer[1], new)
                out.append(answer)
            return out
        return lie

    def test_unsigned_or_foreign_commit(self):
        stranger = lab.register(self.lab.store)
        stranger.machine = self.lab.key.machine

        def unsigned(kind, body):
            return body[:-64] + bytes(64)

        def changed(kind, body):
            return body[:60] + bytes([body[60] ^ 1]) + body[61:]

        def foreign(kind, body):
            return body[:-64] + tarsnap.sign(
                stranger.sign_privs[W], b'tarsnap-history-1\0'
                + body[8:-64])

        def short(kind, body):
            return body[:100]

        def magic(kind, body):
            return body[:8] + b'another-commit-1' + body[24:]

        behind = self.lab.host('behind')
        for number, lie in enumerate((unsigned, changed, foreign, short,
                                      magic)):
            with self.subTest(lie=number):
                for args, cache in ((('--list-archives',), False),
                                    (('--fsck',), True)):
                    self.caught('commit', self.commits(lie), *args,
                                host=behind, cache=cache)

    def test_without_the_signature_a_history_could_be_made_up(self):
        stranger = lab.register(self.lab.store)
        stranger.machine = self.lab.key.machine
        behind = self.lab.host('behind')

        def made_up(kind, body):
            commit = bytearray(body[8:])
            commit[-64:] = tarsnap.sign(
                stranger.sign_privs[W],
                b'tarsnap-history-1\0' + bytes(commit[:-64]))
            return body[:8] + bytes(commit)

        def one(kind, rid, body, answers):
            if kind == tarsnap.CHANGES:
                return self.commits(made_up)(kind, rid, body, answers)
            return answers

        self.caught('signature is wrong', one, '--fsck', host=behind,
                    cache=True)

    def changes(self, change):
        """A liar about CHANGES with lists."""
        def lie(kind, rid, body, answers):
            return list(change(answers)) if kind == tarsnap.CHANGES \
                else answers
        return lie

    def behind(self):
        """A host that has seen everything but what is done after this."""
        other = self.lab.host('b')
        other.good('--fsck')
        return other

    def test_changes_omits_a_commit(self):
        other = self.behind()
        for number in range(3):
            self.host.create('more-%d' % number)

        def without(which):
            def change(answers):
                groups, out = [], []
                for answer in answers:
                    if answer[0] == tarsnap.COMMIT_OBJECT:
                        groups.append([])
                    (groups[-1] if groups and answer[0] != tarsnap.OK
                     else out).append(answer)
                if len(groups) == 3:
                    del groups[which]
                return [a for group in groups for a in group] + out
            return change

        for which in (0, 1):
            self.caught('does not continue', self.changes(without(which)),
                        *self.creating('b'), host=other, cache=True)
        # Leaving out the last looks like a state that is one behind; the
        # head that AUTH told does not.
        with lab.tapped(self.changes(without(2))):
            result = other.run(*self.creating('b'))
        if result.status == 0:
            other.check('b', snapshot(self.lab.tree))

    def test_changes_omits_a_deleted_name(self):
        other = self.behind()
        self.write('new', b'newer')
        self.host.create('three')
        self.host.good('-d', '-f', 'two')

        def change(answers):
            for answer in answers:
                if answer[0] == tarsnap.REMOVED:
                    yield answer[:2] + (join(rows(answer[2], 32)[1:]),)
                else:
                    yield answer

        def nothing(answers):
            return [a for a in answers if a[0] != tarsnap.REMOVED]

        for lie in (change, nothing):
            self.caught('left out or changed names that were deleted',
                        self.changes(lie), *self.creating('b'), host=other,
                        cache=True)
        other.create('b')
        other.check('b', snapshot(self.lab.tree))

    def test_without_that_check_an_archive_would_be_hollow(self):
        other = self.behind()
        other.create('mine')
        other.good('-d', '-f', 'mine')
        self.host.good('-d', '-f', 'one')
        self.host.good('-d', '-f', 'two')

        def nothing(answers):
            return [a for a in answers if a[0] != tarsnap.REMOVED]

        with lab.tapped(self.changes(nothing)), mock.patch.object(
                tarsnap, 'change_check', lambda change, lists: change):
            other.create('b')
        target = self.lab.fresh()
        os.mkdir(target)
        result = other.run('-x', '-f', 'b', '-C', target, cache=False)
        self.assertEqual(result.status, 1, result)

    def test_changes_omits_or_adds_an_added_name(self):
        other = self.behind()
        self.write('new', b'newer')
        self.host.create('three')

        def omit(answers):
            for answer in answers:
                if answer[0] == tarsnap.ADDED:
                    yield answer[:2] + (join(rows(answer[2], 37)[1:]),)
                else:
                    yield answer

        def add(answers):
            for answer in answers:
                if answer[0] == tarsnap.ADDED:
                    yield answer[:2] + (join(
                        rows(answer[2], 37) + [b'\7' * 32 + b'c'
                                               + bytes(4)]),)
                else:
                    yield answer

        def swap(answers):
            for answer in answers:
                if answer[0] == tarsnap.ADDED:
                    yield answer[:2] + (join(rows(answer[2], 37)[::-1]),)
                else:
                    yield answer

        for lie in (omit, add, swap):
            self.caught('left out or changed names that were put',
                        self.changes(lie), *self.creating('b'), host=other,
                        cache=True)
        other.create('b')

    def test_wrong_record_for_an_archive(self):
        """A record that is there and signed, of another archive."""
        live = self.lab.live()
        records = [name for name, row in live.items() if row[0] == b'a']
        stock = {}

        def keep(bodies):
            stock.update((body[:32], body) for body in bodies)
            return bodies

        with lab.tapped(self.blocks(keep)):
            self.host.good('--list-archives', cache=False)

        def other(bodies):
            return [stock[records[body[:32] == records[0]]]
                    if body[:32] in records else body for body in bodies]

        def renamed(bodies):
            return [body[:32] + stock[records[body[:32] == records[0]]][32:]
                    if body[:32] in records else body for body in bodies]

        self.caught('another block', self.blocks(other), '-t', '-f', 'one')
        self.caught('seal is broken', self.blocks(renamed), '-t', '-f',
                    'one')

    def test_another_machines_record(self):
        """Even one that was sealed and signed with the same secrets."""
        key = self.lab.key
        record = tarsnap.Record()
        record.machine = key.machine + 1
        record.title = b'one'
        record.archive = tarsnap.Names(key).archive(b'one')
        record.series = record.lineage = record.tid = bytes(16)
        record.base = (0, bytes(32))
        parts = tarsnap.record_pack(record, key)
        with self.assertRaises(tarsnap.CorruptError) as caught:
            tarsnap.record_unpack(parts, bytes(32), key)
        self.assertIn('another machine', str(caught.exception))
        record.machine = key.machine
        record.archive = tarsnap.Names(key).archive(b'two')
        parts = tarsnap.record_pack(record, key)
        with self.assertRaises(tarsnap.CorruptError) as caught:
            tarsnap.record_unpack(parts, bytes(32), key)
        self.assertIn('wrong archive id', str(caught.exception))

    def test_head_at_auth_differs_from_list(self):
        """Two histories told on one connection."""
        def lie(kind, rid, body, answers):
            return [(a[0], a[1], a[2][:8] + bytes(32) + a[2][40:])
                    if a[0] == tarsnap.AUTHOK else a for a in answers]
        self.caught('two heads', lie, '--list-archives')

    def test_head_at_auth_too_low_or_too_high(self):
        for step in (-1, 1, 1000):
            def lie(kind, rid, body, answers, step=step):
                return [(a[0], a[1], U64.pack(
                    U64.unpack(a[2][:8])[0] + step) + a[2][8:])
                    if a[0] == tarsnap.AUTHOK else a for a in answers]
            for args, cache in ((('--list-archives',), False),
                                (('--list-archives',), True),
                                (self.creating('three'), True)):
                with lab.tapped(lie):
                    result = self.host.run(*args, cache=cache)
                if cache and step == -1:
                    self.assertEqual(result.status, 1, result)
                if result.status == 0 and args[0] == '-c':
                    self.host.check('three', snapshot(self.lab.tree))
                    self.host.good('-d', '-f', 'three')

    def test_nuked_or_made_anew(self):
        """Another machine's empty history is not this one's."""
        for top, folders, _ in os.walk(self.lab.store):
            for name in set(folders) & {'log', 'index'}:
                shutil.rmtree(os.path.join(top, name))
                folders.remove(name)
        for args in self.READING + (self.creating('three'),):
            result = self.host.run(*args)
            self.assertEqual(result.status, 1, (args, result))


class Writing(Liar):
    """Lies about what the server has received."""

    def setUp(self):
        super().setUp()
        self.host.create('one')
        self.write('new', b'new' * 20000)

    def good_or_refused(self, lie, name='two'):
        """Stored right, or not at all and said so."""
        with lab.tapped(lie) as log:
            result = self.host.run(*self.creating(name))
        if result.status == 0:
            self.host.check(name, snapshot(self.lab.tree))
        else:
            self.assertEqual(result.status, 1, result)
            self.assertNotIn('Traceback', result.err)
            self.assertNotIn(name, self.host.good('--list-archives',
                                                  cache=False).out.split())
            # And nothing is spoilt for the next run.
            self.host.create(name)
            self.host.check(name, snapshot(self.lab.tree))
        return result, log

    def test_begun_holds_what_it_does_not(self):
        names = []

        def too_much(kind, rid, body, answers):
            """Names of blocks that this run is going to need."""
            if kind != tarsnap.BEGIN:
                return answers
            row = b''.join(name + b'c' + struct.pack('>I', 100)
                           for name in names)
            return [(tarsnap.BEGUN, rid, bytes(80)),
                    (tarsnap.ADDED, rid, U16.pack(len(names)) + row),
                    (tarsnap.OK, rid, b'')]

        with lab.tapped() as log:
            other = self.lab.host('b')
            other.good('--fsck')
            self.host.create('probe')
        names += [row[0] for row in log.puts(b'c')]
        self.assertTrue(names)
        self.host.good('-d', '-f', 'probe')
        self.host.lose('cache')
        result, _ = self.good_or_refused(too_much)
        self.assertEqual(result.status, 1, 'a hollow archive')

    def test_begun_holds_nothing(self):
        """After a killed run that sent much: it is sent again."""
        real, done = tarsnap.Transaction.commit_object, []

        def die(txn, record, state):
            txn.drain(0)
            os._exit(9)

        self.assertEqual(self.lab.crash(
            self.host, mock.patch.object(tarsnap.Transaction,
                                         'commit_object', die),
            *self.creating('two')), 9)
        del real, done

        def nothing(kind, rid, body, answers):
            return [a for a in answers if a[0] != tarsnap.ADDED]
        self.good_or_refused(nothing)

    def test_begun_of_a_killed_run_is_adopted(self):
        """The honest case: what was sent is not sent twice."""
        def die(txn, record, state):
            txn.drain(0)
            os._exit(9)

        self.assertEqual(self.lab.crash(
            self.host, mock.patch.object(tarsnap.Transaction,
                                         'commit_object', die),
            *self.creating('two')), 9)
        with lab.tapped() as log:
            self.host.create('two')
        self.assertEqual(log.puts(b'c'), [])
        self.host.check('two', snapshot(self.lab.tree))

    def test_blocks_thrown_away(self):
        """PUT answered, and not stored: COMMIT cannot succeed."""
        real = lab.Tap.receive

        def receive(tap, kind, rid, body):
            if kind == tarsnap.PUT and body[32:33] == b'c':
                tap.log.append((kind, body))
                return [(tarsnap.RECEIVED, 0, U64.pack(1000))]
            return real(tap, kind, rid, body)

        def lie(kind, rid, body, answers):
            return [(a[0], a[1], U64.pack(2 ** 20))
                    if a[0] == tarsnap.RECEIVED else a for a in answers]

        with mock.patch.object(lab.Tap, 'receive', receive), \
                lab.tapped(lie):
            result = self.host.run(*self.creating('two'))
        self.assertEqual(result.status, 1, result)
        self.assertNotIn('two', self.host.good('--list-archives',
                                               cache=False).out)
        self.host.create('two')
        self.host.check('two', snapshot(self.lab.tree))

    def test_received_too_high(self):
        def lie(kind, rid, body, answers):
            return [(a[0], a[1], U64.pack(2 ** 63))
                    if a[0] == tarsnap.RECEIVED else a for a in answers]
        self.good_or_refused(lie)

    def test_received_and_lost(self):
        """Acknowledged too high, then the connection goes: the client no
        longer has the bytes and must read its input again.
        """
        state = {'cut': False, 'puts': 0}
        real = lab.Tap.receive

        def receive(tap, kind, rid, body):
            if kind == tarsnap.PUT and not state['cut']:
                state['puts'] += 1
                if state['puts'] == 1:
                    return [(tarsnap.RECEIVED, 0, U64.pack(2 ** 40))]
                if state['puts'] >= 2:
                    state['cut'] = True
                    raise OSError(104, 'Connection reset by peer')
            return real(tap, kind, rid, body)

        self.write('more', os.urandom(500000))
        with mock.patch.object(lab.Tap, 'receive', receive), lab.tapped():
            self.host.create('two')
        self.assertTrue(state['cut'])
        self.host.check('two', snapshot(self.lab.tree))

    def test_committed_another(self):
        def lie(kind, rid, body, answers):
            return [(a[0], a[1], a[2][:8] + bytes(32) + a[2][40:])
                    if a[0] == tarsnap.COMMITTED else a for a in answers]
        with lab.tapped(lie):
            result = self.host.run(*self.creating('two'))
        self.assertEqual(result.status, 1)
        self.assertIn('took another commit', result.err)
        # It had taken it: the next run finds out.
        self.host.good('--recover')
        self.host.check('two', snapshot(self.lab.tree))

    def test_committed_and_did_not(self):
        """The next run of this host sees that the history lacks it."""
        def lie(kind, rid, body, answers):
            return answers
        real = lab.Tap.receive

        def receive(tap, kind, rid, body):
            if kind == tarsnap.COMMIT:
                commit = tarsnap.commit_unpack(body, self.lab.key)
                return [(tarsnap.COMMITTED, rid, U64.pack(commit.n)
                         + tarsnap.sha256(body) + U64.pack(0))]
            return real(tap, kind, rid, body)

        with mock.patch.object(lab.Tap, 'receive', receive), lab.tapped(lie):
            self.host.create('two')
        for args in (('--list-archives',), self.creating('three'),
                     ('-t', '-f', 'one')):
            result = self.host.run(*args)
            self.assertEqual(result.status, 1, result)
            self.assertRegex(result.err, 'rolled back|hides')

    def test_has_is_not_believed_for_storing(self):
        """The client never takes HAS for a reason not to send."""
        def lie(kind, rid, body, answers):
            return [(a[0], a[1], b'\xff' * 512) if a[0] == tarsnap.BITMAP
                    else a for a in answers]
        self.good_or_refused(lie)

    def test_oversized_frames(self):
        """Through a pipe, where frames have lengths."""
        channel = tarsnap.Channel.__new__(tarsnap.Channel)
        channel.server = 'there'
        with self.assertRaises(tarsnap.RemoteError) as caught:
            channel.parse(bytearray(struct.pack('>IBI', 2 ** 20 + 4097, 139,
                                                1)))
        self.assertIn('longer than any', str(caught.exception))

    def test_lists_too_long(self):
        """A list of more names than a frame may have."""
        def lie(kind, rid, body, answers):
            return [(a[0], a[1], U16.pack(5000) + bytes(5000 * 37))
                    if a[0] == tarsnap.ADDED else a for a in answers]
        self.caught('malformed list', lie, '--fsck',
                    host=self.lab.host('b'), cache=True)

    def test_answers_cut_short(self):
        """Any answer, cut anywhere: an error in words, never a traceback."""
        for wanted in (tarsnap.AUTHOK, tarsnap.COMMIT_OBJECT,
                       tarsnap.ARCHIVES, tarsnap.ADDED, tarsnap.BLOCK,
                       tarsnap.COMMITTED, tarsnap.ERROR):
            for length in (0, 1, 7, 33):
                def lie(kind, rid, body, answers):
                    return [(a[0], a[1], a[2][:length]) if a[0] == wanted
                            else a for a in answers]
                for args, cache in ((('--list-archives',), False),
                                    (('-t', '-f', 'one'), False),
                                    (self.creating('cut'), True)):
                    with lab.tapped(lie):
                        result = self.host.run(*args, cache=cache)
                    self.assertIn(result.status, (0, 1), result)
                    self.assertNotIn('Traceback', result.err)
            self.host.run('-d', '-f', 'cut')

    def test_answers_of_another_type(self):
        for new in (tarsnap.OK, tarsnap.STATUS, tarsnap.BITMAP, 200):
            for old in (tarsnap.AUTHOK, tarsnap.COMMITTED):
                def lie(kind, rid, body, answers):
                    return [(new, a[1], a[2]) if a[0] == old else a
                            for a in answers]
                if old == tarsnap.AUTHOK and new == tarsnap.OK:
                    continue
                with lab.tapped(lie):
                    result = self.host.run(*self.creating('type'))
                self.assertIn(result.status, (0, 1, 2), result)
                self.host.good('--recover')
                self.host.run('-d', '-f', 'type')


class Endless(Liar):
    """Answers without end take neither memory nor time without end."""

    def setUp(self):
        super().setUp()
        self.host.create('one')

    def test_lists_longer_than_the_commit_says(self):
        """Refused with the first name too many."""
        told = []

        def forever(rid, kind, row):
            while True:
                told.append(kind)
                yield (kind, rid, join([row] * 4096))

        def added(kind, rid, body, answers):
            if kind != tarsnap.CHANGES:
                return answers
            return itertools.chain(
                answers[:1], forever(rid, tarsnap.ADDED, bytes(37)))

        def removed(kind, rid, body, answers):
            if kind != tarsnap.CHANGES:
                return answers
            return itertools.chain(
                answers[:1], forever(rid, tarsnap.REMOVED, bytes(32)))

        for lie in (added, removed):
            with self.endless(lie):
                result = self.lab.host(lie.__name__).run('--fsck')
            self.assertEqual(result.status, 1, result)
            self.assertIn('left out or changed names', result.err)

    @contextlib.contextmanager
    def endless(self, lie, most=300):
        """A liar whose answers are cut where a client must have left."""
        def cut(kind, rid, body, answers):
            return itertools.islice(lie(kind, rid, body, answers), most)

        with lab.tapped(cut):
            yield

    def test_a_list_of_archives_without_end(self):
        def lie(kind, rid, body, answers):
            return itertools.repeat((tarsnap.ARCHIVES, rid, join(
                [bytes(89)] * 4096))) if kind == tarsnap.LIST else answers

        with mock.patch.object(tarsnap, 'ANSWER_MOST', 10 << 20), \
                self.endless(lie):
            result = self.host.run('--list-archives', cache=False)
        self.assertEqual(result.status, 1, result)
        self.assertIn('has no end', result.err)


class Torrent:
    """A link whose server sends `frame` without end, or nothing if None."""

    transport, cert_hash = tarsnap.TRANSPORT_STDIO, bytes(32)

    def __init__(self, frame):
        self.frame = frame
        self.given = 0
        self.r, self.w = os.pipe()
        if frame:                       # there is always something to read
            os.write(self.w, b'.')

    def open(self):
        pass

    def fileno(self):
        return self.r

    def write_fileno(self):
        return self.w

    def write(self, view):
        return len(view)

    def pending(self):
        return 0

    def read(self, size):
        self.given += len(self.frame or b'')
        return self.frame

    def close(self):
        os.close(self.r)
        os.close(self.w)


class Flood(unittest.TestCase):
    """What a server sends faster than it is taken waits on its side."""

    def channel(self, frame):
        link = Torrent(frame)
        with mock.patch.object(tarsnap, 'link_make', lambda *_: link):
            channel = tarsnap.Channel('there')
        self.addCleanup(channel.close)
        return channel, link

    def frame(self, rid, size):
        return tarsnap.FRAME.pack(size, tarsnap.BLOCK, rid) + bytes(size)

    def test_answers_that_are_not_taken_yet(self):
        for size in (0, 100000):
            channel, link = self.channel(self.frame(1, size) * 10)
            rid = channel.post(tarsnap.STAT)
            before = -1
            while link.given != before:
                before = link.given
                time.sleep(0.3)
            self.assertGreater(channel.queued, tarsnap.QUEUED_MOST)
            self.assertLess(channel.queued, tarsnap.QUEUED_MOST + (4 << 20))
            # As soon as they are, there is more.
            for _ in range(10):
                channel.next(rid)
            channel.forget(rid)
            self.assertEqual(channel.queued, 0)

    def test_frames_nobody_asked_for(self):
        channel, link = self.channel(self.frame(99, 100000) * 10)
        end = time.monotonic() + 20
        while link.given < 300 << 20 and time.monotonic() < end:
            time.sleep(0.05)
        self.assertGreaterEqual(link.given, 300 << 20)
        self.assertEqual(channel.queued, 0)

    def test_a_gigabyte_announced(self):
        channel, _ = self.channel(tarsnap.FRAME.pack(
            1 << 30, tarsnap.BLOCK, 1) + bytes(1000))
        with self.assertRaises(tarsnap.ChannelLost) as caught:
            channel.wait_statement()
        self.assertIn('longer than any', str(caught.exception))

    def test_no_answer(self):
        """It says nothing at all: given up after a while."""
        channel, _ = self.channel(None)
        with mock.patch.object(tarsnap, 'SILENCE', 0.2):
            rid = channel.post(tarsnap.STAT)
            with self.assertRaises(tarsnap.ChannelLost) as caught:
                channel.next(rid)
        self.assertIn('No answer from there', str(caught.exception))

    def test_a_bomb_in_a_block(self):
        """Packed zeros inflate to what the block says and no further."""
        packed = tarsnap.deflate(bytes(1 << 28), 9)
        for length in (100, tarsnap.CEILING['part'], 1 << 28):
            plain = tarsnap.PLAIN_HEAD.pack(
                tarsnap.DEFLATE, length, len(packed)) + packed
            tracemalloc.start()
            with self.assertRaises(tarsnap.CorruptError):
                tarsnap.unframe_plain(plain, tarsnap.CEILING['part'], 'x')
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertLess(peak, 2 << 20)


class Identity(Liar):
    """Nothing is sent to a server that is not the key's."""

    def setUp(self):
        super().setUp()
        self.host.create('one')
        self.identity = tarsnap.key_make('', '')

    def sent_nothing(self, words, statement):
        for args, cache in ((('--list-archives',), False),
                            (self.creating('two'), True),
                            (('--fsck',), True)):
            log = self.caught(words, None, *args, cache=cache,
                              statement=statement)
            self.assertEqual(log, [])

    def resigned(self, body, store=None, key=None, cert=bytes(32)):
        """A statement signed anew, by the identity of a stranger."""
        store = store or body[34:50]
        pub, private = (self.identity.sign_pubs[R],
                        self.identity.sign_privs[R])
        return body[:2] + pub + store + body[50:90] + tarsnap.sign(
            private, b'tarsnap-server-1\0' + store + body[50:58] + cert)

    def test_wrong_identity(self):
        self.sent_nothing('is not the server this key was made with',
                          self.resigned)

    def test_wrong_store(self):
        """The right identity with another store."""
        pin = tarsnap.sha256(self.identity.sign_pubs[R])
        key = self.lab.key.subset({R, W})
        key.pins = [pin]
        os.unlink(self.host.keyfile)
        tarsnap.key_write(tarsnap.key_create(self.host.keyfile), key)
        self.sent_nothing('holds another store', lambda body: self.resigned(
            body, store=b'another store id'))

    def test_signature_over_another_certificate(self):
        key = self.lab.key.subset({R, W})
        key.pins = [tarsnap.sha256(self.identity.sign_pubs[R])]
        os.unlink(self.host.keyfile)
        tarsnap.key_write(tarsnap.key_create(self.host.keyfile), key)
        self.sent_nothing('does not vouch for the certificate',
                          lambda body: self.resigned(body, cert=b'c' * 32))

    def test_signature_missing(self):
        self.sent_nothing('does not vouch', lambda body: body[:-64]
                          + bytes(64))
        self.sent_nothing('cut short', lambda body: body[:50])
        self.sent_nothing('too many', lambda body: body + b'\0')

    def test_another_version(self):
        self.sent_nothing('speaks protocol 2', lambda body: b'\0\2'
                          + body[2:])

    def test_replayed_statement(self):
        """An old first frame is good for nothing: AUTH signs its nonce."""
        kept = []

        def keep(body):
            kept.append(body)
            return kept[0]

        with lab.tapped(None, keep):
            self.host.good('--list-archives', cache=False)
            result = self.host.run('--list-archives', cache=False)
        self.assertEqual(result.status, 1)


if __name__ == '__main__':
    unittest.main()
