# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Fetching: order, window, damage, lost connections, and how little one file
of a large archive costs."""

import os
import random
import signal
import threading
import time
import unittest
from unittest import mock

import storefake
import tarsnap
from tarsnap import CHUNK, CorruptError, Fetcher, Kid, KIB, RemoteError


class FetchCase(unittest.TestCase):

    def setUp(self):
        self.store = storefake.Store()

    def remote(self, **given):
        self.served = storefake.FakeRemote(self.store, **given)
        return self.served

    def fetcher(self, **given):
        fetcher = Fetcher(self.remote(**given), self.openers())
        self.addCleanup(fetcher.close)
        return fetcher

    def openers(self):
        return None

    def chunks(self, count, size=1000):
        rng = random.Random(count)
        data = [rng.randbytes(size) for _ in range(count)]
        return data, [self.store.chunk(piece) for piece in data]


def jobs(kids, keep=False):
    return ((kid, keep, number) for number, kid in enumerate(kids))


class OrderTest(FetchCase):

    def test_blocks_come_in_the_order_wanted(self):
        data, kids = self.chunks(500)
        order = random.Random(7).choices(range(500), k=1500)
        fetcher = self.fetcher()
        stream = fetcher.ahead((kids[n], True, n) for n in order)
        got = [(tag, slot.get()) for slot, tag in stream]
        self.assertEqual(got, [(n, data[n]) for n in order])

    def test_many_names_to_a_request(self):
        _, kids = self.chunks(1000)
        fetcher = self.fetcher()
        for slot, _ in fetcher.ahead(jobs(kids)):
            slot.get()
        self.assertEqual(self.served.asked, [kid.name for kid in kids])
        self.assertLess(self.served.gets, 12)

    def test_window_is_in_bytes(self):
        _, kids = self.chunks(40, 100 * KIB)
        fetcher = self.fetcher()
        window = 1000 * KIB
        most, taken = 0, 0
        for slot, _ in fetcher.ahead(jobs(kids), window):
            slot.get()
            most = max(most, len(self.served.asked) - taken)
            taken += 1
        self.assertLessEqual(most * 100 * KIB, window + 100 * KIB)
        self.assertGreater(most * 100 * KIB, window // 2)
        self.assertEqual(taken, 40)

    def test_a_chunk_in_a_row_is_asked_for_once(self):
        data, kids = self.chunks(1)
        fetcher = self.fetcher()
        for slot, _ in fetcher.ahead(jobs(kids * 100)):
            self.assertEqual(slot.get(), data[0])
        self.assertEqual(len(self.served.asked), 1)

    def test_shared_chunks_are_kept_and_others_not(self):
        _, kids = self.chunks(3)
        for keep, count in ((True, 3), (False, 6)):
            fetcher = self.fetcher()
            for _ in range(2):
                for slot, _ in fetcher.ahead(jobs(kids, keep)):
                    slot.get()
                del slot
            self.assertEqual(len(self.served.asked), count)

    def test_what_is_kept_has_a_limit(self):
        _, kids = self.chunks(30, 10 * KIB)
        with mock.patch.object(tarsnap, 'FETCH_KEEP', 100 * KIB):
            fetcher = self.fetcher()
            for slot, _ in fetcher.ahead(jobs(kids, True)):
                slot.get()
            self.assertLessEqual(fetcher.kept_bytes, 100 * KIB)
            self.assertEqual(len(fetcher.kept), 10)

    def test_threads_end_with_it(self):
        _, kids = self.chunks(3)
        fetcher = self.fetcher()
        fetcher.get(kids[0])
        self.assertTrue(fetcher.threads)
        fetcher.close()
        for thread in fetcher.threads:
            thread.join(5)
            self.assertFalse(thread.is_alive())


class DamageTest(FetchCase):

    def damaged(self, block):
        """What a reader says when the third of five blocks is `block`."""
        _, kids = self.chunks(5)
        fetcher = self.fetcher(mangle=lambda name, whole:
                               block if name == kids[2].name else whole)
        good, errors = [], []
        for slot, number in fetcher.ahead(jobs(kids)):
            try:
                slot.get()
                good.append(number)
            except CorruptError as e:
                errors.append(str(e))
        self.assertEqual(good, [0, 1, 3, 4])
        self.assertIn(kids[2].name.hex()[:16], errors[0])
        return errors[0]

    def test_missing(self):
        self.assertIn('missing', self.damaged(None))
        self.assertEqual(self.served.gets, 1)       # the rest came with it

    def test_unreadable_at_the_server(self):
        self.assertIn('disk on fire', self.damaged(tarsnap.Refused(
            tarsnap.E_INTERNAL, 'disk on fire')))

    def test_a_request_that_fails_as_a_whole(self):
        # One ERROR and nothing after it; what is left is asked again.
        data, kids = self.chunks(5)
        fetcher = self.fetcher()
        answer, calls = self.served.answer, []

        def failing(kind, body):
            calls.append(1)
            if len(calls) == 1:
                return [(tarsnap.ERROR, tarsnap.U16.pack(
                    tarsnap.E_INTERNAL) + b'index is locked')]
            return answer(kind, body)

        with mock.patch.object(self.served, 'answer', failing):
            slots = [slot for slot, _ in fetcher.ahead(jobs(kids))]
            with self.assertRaisesRegex(CorruptError, 'index is locked'):
                slots[0].get()
            self.assertEqual([slot.get() for slot in slots[1:]], data[1:])

    def test_answered_under_another_name(self):
        _, kids = self.chunks(2)
        fetcher = self.fetcher()
        with mock.patch.object(self.served, 'block', lambda name: kids[1].name
                               + self.store.blocks[kids[1].name]):
            with self.assertRaisesRegex(CorruptError, 'another block'):
                fetcher.get(kids[0])

    def test_empty_and_short(self):
        self.damaged(b'')
        self.damaged(b'x' * 10)

    def test_cut_short_anywhere(self):
        _, kids = self.chunks(1)
        block = self.store.blocks[kids[0].name]
        lengths = iter(range(0, len(block), 7))
        fetcher = self.fetcher(
            mangle=lambda name, whole: whole[:next(lengths)])
        for _ in range(0, len(block), 7):
            with self.assertRaises(CorruptError):
                fetcher.get(kids[0])

    def test_any_bit(self):
        _, kids = self.chunks(1, 100)
        block = bytearray(self.store.blocks[kids[0].name])
        fetcher = self.fetcher(mangle=lambda name, whole: bytes(block))
        for at in range(len(block)):
            block[at] ^= 4
            with self.assertRaises(CorruptError):
                fetcher.get(kids[0])
            block[at] ^= 4
        self.assertEqual(len(fetcher.get(kids[0])), 100)

    def test_swapped(self):
        _, kids = self.chunks(2)
        other = {kids[0].name: kids[1].name, kids[1].name: kids[0].name}
        fetcher = self.fetcher(mangle=lambda name, whole:
                               self.store.blocks[other[name]])
        for kid in kids:
            with self.assertRaises(CorruptError):
                fetcher.get(kid)

    def test_sealed_under_a_name_its_content_has_not(self):
        # GCM passes: only the name tells.
        name = self.store.names.chunk(b'one thing')
        self.store.put(CHUNK, name, [b'the other'])
        with self.assertRaisesRegex(CorruptError, 'not what its name says'):
            self.fetcher().get(Kid(CHUNK, name, 9))

    def test_index_with_rows_of_another(self):
        store = self.store
        refs = tarsnap.index_refs(tarsnap.PAGE, 0, store.names.rows(b'a'), [])
        name = store.names.index(refs)
        store.put(tarsnap.INDEX, name, [refs, b'b'])
        with self.assertRaisesRegex(CorruptError, 'rows'):
            self.fetcher().get(Kid(tarsnap.INDEX, name, 0))

    def test_length_other_than_its_parent_says(self):
        kid = self.store.chunk(b'nine bytes')
        with self.assertRaises(CorruptError):
            self.fetcher().get(Kid(CHUNK, kid.name, 9))

    def test_left_out_by_the_server(self):
        _, kids = self.chunks(3)
        fetcher = self.fetcher()
        answer = self.served.answer

        def without_last(kind, body):
            answers = answer(kind, body)
            return answers[:-2] + answers[-1:]

        with mock.patch.object(self.served, 'answer', without_last):
            slots = [slot for slot, _ in fetcher.ahead(jobs(kids))]
            slots[0].get()
            with self.assertRaisesRegex(CorruptError, 'left out'):
                slots[2].get()


class LostTest(FetchCase):

    def test_a_connection_lost_at_any_block(self):
        data, kids = self.chunks(12)
        for at in range(1, 13):
            fetcher = self.fetcher(lose=(at,))
            got = [slot.get() for slot, _ in fetcher.ahead(jobs(kids))]
            self.assertEqual(got, data)
            self.assertEqual(self.served.connects, 2)
            fetcher.close()

    def test_lost_again_and_again(self):
        data, kids = self.chunks(60)
        fetcher = self.fetcher(lose=range(5, 90, 3))
        got = [slot.get() for slot, _ in fetcher.ahead(jobs(kids), 20 * KIB)]
        self.assertEqual(got, data)
        self.assertGreater(self.served.connects, 20)

    def test_lost_for_good(self):
        _, kids = self.chunks(12)
        fetcher = self.fetcher(lose=(4,))
        connect, calls = self.served.connect, []

        def gone():
            calls.append(1)
            if len(calls) > 1:
                raise RemoteError('Too many network failures')
            return connect()

        with mock.patch.object(self.served, 'connect', gone):
            with self.assertRaisesRegex(RemoteError, 'Too many'):
                for slot, _ in fetcher.ahead(jobs(kids)):
                    slot.get()
            with self.assertRaisesRegex(RemoteError, 'Too many'):
                fetcher.get(kids[11])


class Opened:
    """The same with processes that open chunks."""

    def openers(self):
        return tarsnap.Openers(self.store.key)


class OpenedOrderTest(Opened, OrderTest):

    def test_chunks_of_all_lengths_in_any_order(self):
        """Nothing waits for ever, however the answers come."""
        rng = random.Random(6)
        data = [rng.randbytes(rng.choice(
            (1, 100, 10 * KIB, 255 * KIB, 256 * KIB))) for _ in range(150)]
        kids = [self.store.chunk(piece) for piece in data]
        order = rng.choices(range(150), k=900)
        fetcher = self.fetcher()
        block = self.served.block

        def late(name):
            if not rng.randrange(9):
                time.sleep(rng.random() / 100)
            return block(name)

        with mock.patch.object(self.served, 'block', late):
            for slot, n in fetcher.ahead((kids[n], n % 2, n) for n in order):
                if rng.randrange(9):        # or nobody wants it after all
                    self.assertEqual(slot.get(), data[n])


class OpenedDamageTest(Opened, DamageTest):

    def test_longer_than_any_slot(self):
        self.damaged(b'x' * tarsnap.SLOT)

    def test_more_than_memory_for_one_block(self):
        def failing(*args):
            raise MemoryError
        with mock.patch.object(tarsnap, 'chunk_open', failing):
            fetcher = self.fetcher()
        with self.assertRaisesRegex(CorruptError, 'MemoryError'):
            fetcher.get(self.chunks(1)[1][0])

    def killed(self, count):
        """Read all while `count` workers are killed."""
        data, kids = self.chunks(400, 10 * KIB)
        fetcher = self.fetcher()
        for slot, number in fetcher.ahead(jobs(kids), 100 * KIB):
            self.assertEqual(slot.get(), data[number])
            if number == 20:
                for pid in list(fetcher.openers.workers)[:count]:
                    os.kill(pid, signal.SIGKILL)

    def test_workers_that_are_killed(self):
        """One line for whoever waits, and no wait for ever."""
        ended = 'worker process(es have| ended)'
        unheard = []
        patch = mock.patch.object(threading, 'excepthook', unheard.append)
        patch.start()
        self.addCleanup(patch.stop)
        with self.assertRaisesRegex(tarsnap.Error, ended):
            self.killed(tarsnap.WORKERS_MOST)
        try:
            self.killed(1)          # the others may do it all
        except tarsnap.Error as e:
            self.assertRegex(str(e), ended)
        self.assertEqual(unheard, [])

    def test_a_collector_that_breaks(self):
        """Who waits is told of a bug too."""
        _, kids = self.chunks(3)
        fetcher = self.fetcher()
        with mock.patch.object(fetcher.openers, 'collect',
                               side_effect=KeyError('x')):
            with self.assertRaisesRegex(tarsnap.Error, "KeyError: 'x'"):
                fetcher.get(kids[0])

    def test_what_ended_it_is_told(self):
        """Not what follows from that, in the thread that receives."""
        _, kids = self.chunks(1)
        fetcher = self.fetcher()
        real, over = fetcher.openers.add, threading.Event()

        def late(*args):                # what came is added after the end
            over.wait(60)
            return real(*args)

        with mock.patch.object(fetcher.openers, 'add', late), \
                mock.patch.object(fetcher.openers, 'collect',
                                  side_effect=KeyError('x')):
            slot = fetcher.want(kids[0])
            fetcher.flush()
            while not fetcher.openers.closed:
                time.sleep(0.001)
            over.set()
            fetcher.close()
            for thread in fetcher.threads:
                thread.join()
        self.assertRegex(str(slot.error), "KeyError: 'x'")

    def test_closed_in_the_midst(self):
        _, kids = self.chunks(400, 100 * KIB)
        for taken in range(0, 40, 4):
            fetcher = self.fetcher()
            stream = fetcher.ahead(jobs(kids))
            for _ in range(taken):
                next(stream)[0].get()
            pids = set(fetcher.openers.workers)
            fetcher.close()
            for pid in pids:
                self.assertFalse(os.path.exists('/proc/%d' % pid))


class OpenedLostTest(Opened, LostTest):
    pass


class ThreadsTest(FetchCase):
    """Where the system gives no more threads."""

    def few(self, count):
        """Only so many more threads."""
        left, real = [None] * count, threading.Thread.start

        def start(thread):
            if not left:
                raise RuntimeError("can't start new thread")
            left.pop()
            real(thread)

        return mock.patch.object(threading.Thread, 'start', start)

    def read(self, openers, kids):
        fetcher = Fetcher(self.remote(), openers)
        try:
            return [slot.get() for slot, _ in fetcher.ahead(jobs(kids))]
        finally:
            fetcher.close()

    def test_one_that_works_is_enough(self):
        data, kids = self.chunks(20)
        for openers, least in (lambda: None, 1), (self.openers_had, 2):
            for count in range(4):
                given = openers()
                pids = set(given.workers) if given else ()
                with self.few(count):
                    if count < least:
                        with self.assertRaisesRegex(tarsnap.Error,
                                                    'Cannot start a thread'):
                            self.read(given, kids)
                    else:
                        self.assertEqual(self.read(given, kids), data)
                for pid in pids:
                    self.assertFalse(os.path.exists('/proc/%d' % pid))

    def openers_had(self):
        return tarsnap.Openers(self.store.key)

    def test_openers_leave_room_for_threads(self):
        made, real = [], tarsnap.Openers

        def make(key):
            made.append(real(key))
            return made[-1]

        with mock.patch.object(tarsnap, 'Openers', make), self.few(3):
            self.assertIsNone(tarsnap.openers_make(self.store.key))
        self.assertTrue(made[0].slots.closed)
        openers = tarsnap.openers_make(self.store.key)
        self.assertTrue(openers.workers)
        openers.close()


class EntriesTest(FetchCase):

    def archive(self, files, **given):
        builder = storefake.Builder(self.store, **given)
        builder.add(b'top', tarsnap.DIRECTORY)
        for number in range(files):
            directory = b'top/d%03d' % (number // 10)
            if number % 10 == 0:
                builder.add(directory, tarsnap.DIRECTORY)
            builder.add(directory + b'/f%d' % (number % 10), data=b'x')
        return builder, builder.finish()

    def paths(self, record, wanted=None):
        fetcher = self.fetcher()
        return [entry.path for entry, _ in
                tarsnap.archive_entries(fetcher, record, wanted)]

    def test_all_entries_in_order_at_any_depth(self):
        for fan in (2, 3, 100):
            builder, record = self.archive(60, fan=fan, per_page=3)
            self.assertEqual(self.paths(record), builder.paths)
            self.assertEqual(record.level > 1, fan < 100)

    def test_one_file_costs_a_logarithm_of_blocks(self):
        builder, record = self.archive(2000, fan=8, per_page=4)
        self.assertGreater(record.pages, 500)
        for path in builder.paths[5::97]:
            found = self.paths(record, {path})
            self.assertIn(path, found)
            self.assertLess(self.served.sent, 14, path)

    def test_one_file_of_an_archive_without_lists(self):
        builder, record = self.archive(200, fan=64, per_page=4)
        self.assertEqual(record.level, 0)
        self.assertGreater(record.pages, 50)
        for path in builder.paths[::7]:
            below = [other for other in builder.paths
                     if (other + b'/').startswith(path + b'/')]
            self.assertLessEqual(set(below), set(self.paths(record, {path})))
            self.assertLess(self.served.sent, 16 + len(below) // 4)

    def test_several_files_far_apart(self):
        builder, record = self.archive(2000, fan=8, per_page=4)
        wanted = {builder.paths[3], builder.paths[1000], builder.paths[-1]}
        self.assertLessEqual(wanted, set(self.paths(record, wanted)))
        self.assertLess(self.served.sent, 40)

    def test_a_directory_brings_all_below_it(self):
        builder, record = self.archive(400, fan=4, per_page=3)
        below = [path for path in builder.paths
                 if path.startswith(b'top/d017')]
        self.assertEqual(len(below), 11)
        self.assertLessEqual(set(below),
                             set(self.paths(record, {b'top/d017'})))
        self.assertLess(self.served.sent, 30)

    def test_what_is_not_there_costs_little(self):
        _, record = self.archive(2000, fan=8, per_page=4)
        for path in (b'a', b'top/d050x', b'zz', b'top/d01/f5'):
            self.assertNotIn(path, self.paths(record, {path}))
            self.assertLess(self.served.sent, 14)

    def test_names_after_dot_slash_are_found_too(self):
        builder = storefake.Builder(self.store, per_page=3, fan=4)
        builder.add(b'.', tarsnap.DIRECTORY)
        for number in range(500):
            builder.add(b'./f%03d' % number)
        record = builder.finish()
        self.assertTrue(record.sorted)
        self.assertIn(b'./f321', self.paths(record, {b'f321'}))
        self.assertLess(self.served.sent, 25)

    def test_an_archive_without_order_is_read_whole(self):
        builder = storefake.Builder(self.store, per_page=3, fan=4)
        for number in random.Random(1).sample(range(200), 200):
            builder.add(b'f%03d' % number)
        record = builder.finish()
        self.assertFalse(record.sorted)
        self.assertEqual(self.paths(record, {b'f100'}), builder.paths)

    def test_sorting_is_by_component(self):
        builder = storefake.Builder(self.store, per_page=1, fan=2)
        for path in (b'a', b'a/b', b'a/c', b'a-b', b'a.b', b'a0'):
            builder.add(path)
        record = builder.finish()
        self.assertTrue(record.sorted)
        for path in builder.paths:
            self.assertIn(path, self.paths(record, {path}))

    def test_pages_ahead_are_few(self):
        _, record = self.archive(2000, fan=500, per_page=4)
        fetcher = self.fetcher()
        with mock.patch.object(tarsnap, 'INDEX_WINDOW', 12 * KIB):
            pages = tarsnap.archive_pages(fetcher, record)
            next(pages)
        self.assertLess(len(self.served.asked), 60)
        self.assertGreater(len(self.served.asked), 5)

    def test_bad_pages_are_told_and_the_rest_goes_on(self):
        builder, record = self.archive(100, fan=100, per_page=4)
        lost = record.kids[3].name
        del self.store.blocks[lost]
        errors = []
        fetcher = self.fetcher()
        paths = [entry.path for page in tarsnap.archive_pages(
            fetcher, record, None, errors.append)
            for entry in tarsnap.page_rows(page)]
        self.assertEqual(paths, builder.paths[:12] + builder.paths[16:])
        self.assertIn(lost.hex()[:16], str(errors[0]))
        with self.assertRaises(CorruptError):
            self.paths(record)

    def test_a_list_where_a_page_must_be(self):
        _, record = self.archive(100, fan=4, per_page=4)
        record.level -= 1
        with self.assertRaisesRegex(CorruptError, 'kind or level'):
            self.paths(record)

    def test_rows_the_fast_way_are_rows_the_long_way(self):
        builder = storefake.Builder(self.store, per_page=100, small=5000)
        for entry in samples_of_rows():
            builder.add(**entry)
        record = builder.finish()
        page = next(tarsnap.archive_pages(self.fetcher(), record))
        fast, slow = ([[getattr(entry, field) for field in entry.__slots__]
                       for entry in read(page)]
                      for read in (tarsnap.page_rows, tarsnap.page_entries))
        self.assertEqual(fast, slow)
        self.assertEqual(len(fast), len(samples_of_rows()))
        self.assertEqual(
            list(tarsnap.page_paths(page)),
            [(entry.kind, entry.path)
             for entry in tarsnap.page_entries(page)])

    def test_damaged_rows_are_refused_the_same_both_ways(self):
        builder = storefake.Builder(self.store, per_page=100, small=5000)
        for entry in samples_of_rows():
            builder.add(**entry)
        page = next(tarsnap.archive_pages(self.fetcher(), builder.finish()))
        rows, seed = page.rows, 5
        for page.rows in storefake.samples.mutations(rows, 3000, seed):
            outcome = []
            for read in (tarsnap.page_rows, tarsnap.page_entries):
                got = []
                try:
                    for entry in read(page):
                        got.append([getattr(entry, field)
                                    for field in entry.__slots__])
                except CorruptError as e:
                    got.append(str(e))
                outcome.append(got)
            self.assertEqual(*outcome)


def samples_of_rows():
    """Arguments of Builder.add for rows of every kind."""
    return [
        {'path': b'd', 'kind': tarsnap.DIRECTORY},
        {'path': b'd/empty'},
        {'path': b'd/small', 'data': b'abc', 'uname': b'me', 'gname': b'us'},
        {'path': b'd/small2', 'data': b'abcd', 'uid': 2 ** 32 - 1},
        {'path': b'd/one', 'data': os.urandom(6000)},
        {'path': b'd/many', 'data': os.urandom(140000)},
        {'path': b'd/old', 'data': b'x', 'mtime': -1},
        {'path': b'd/atime', 'data': b'y', 'atime': 12345678901},
        {'path': b'd/link', 'kind': tarsnap.SYMLINK, 'target': b'a/b'},
        {'path': b'd/fifo', 'kind': tarsnap.FIFO},
        {'path': b'd/dev', 'kind': tarsnap.CHARDEV, 'device': (5, 1)},
        {'path': b'd/x', 'xattrs': ((b'user.a', b'1'),
                                    (b'user.b', b'2' * 5000))},
        {'path': b'd/h', 'data': b'z', 'link': (77, 1)},
        {'path': b'd/hole', 'parts': [4096, b'q' * 10, 4096]},
        {'path': b'd/rep', 'parts': [(b'r' * 1000, 50)]},
        {'path': b'd/lists', 'parts': [bytes([n]) * 10 for n in range(80)]},
        {'path': b'd/\xff\n', 'mode': 0o7777},
    ]


class ExtentsTest(FetchCase):

    def content(self, entry, page):
        out = b''
        fetcher = self.fetcher()
        for kid, offset, length, repeat in tarsnap.entry_extents(
                fetcher, entry, page):
            data = bytes(length) if kid is None else \
                fetcher.get(kid)[offset:offset + length]
            out += data * repeat
        return out

    def test_every_shape_of_content(self):
        rng = random.Random(3)
        pieces = [rng.randbytes(50) for _ in range(200)]
        builder = storefake.Builder(self.store, per_page=10, fan=3)
        builder.add(b'few', parts=[b'ab', 5, (b'cd', 3)])
        builder.add(b'many', parts=[number if number % 3 == 0 else
                                    pieces[number]
                                    for number in range(1, 200)])
        expected = [b'ab' + bytes(5) + b'cdcdcd', b''.join(
            bytes(number) if number % 3 == 0 else pieces[number]
            for number in range(1, 200))]
        record = builder.finish()
        pairs = list(tarsnap.archive_entries(self.fetcher(), record))
        self.assertGreater(pairs[1][0].level, 2)
        for (entry, page), data in zip(pairs, expected):
            self.assertEqual(self.content(entry, page), data)

    def test_list_of_the_wrong_level(self):
        builder = storefake.Builder(self.store, fan=100)
        builder.add(b'f', parts=[bytes([n]) for n in range(70)])
        record = builder.finish()
        (entry, page), = tarsnap.archive_entries(self.fetcher(), record)
        entry.level = 2
        with self.assertRaises(CorruptError):
            list(tarsnap.entry_extents(self.fetcher(), entry, page))


class FindTest(FetchCase):

    def test_name_that_is_not_there(self):
        storefake.Builder(self.store, b'one').add(b'f').finish()
        remote = self.remote()
        with self.assertRaisesRegex(tarsnap.UserError,
                                    '^Archive does not exist: two$'):
            tarsnap.archive_find(remote, self.store.live, b'two', None)

    def test_record_of_another_archive(self):
        one = storefake.Builder(self.store, b'one').add(b'f').finish()
        two = storefake.Builder(self.store, b'two').add(b'g').finish()
        live = dict(self.store.live)
        live[one.archive] = live[two.archive]
        with self.assertRaises(CorruptError):
            tarsnap.archive_find(self.remote(), live, b'one', None)

    def test_partial_record_shown_as_complete(self):
        record = storefake.Builder(self.store, b'one').add(b'f').finish(
            complete=False, state=tarsnap.COMPLETE)
        self.assertFalse(record.complete)
        with self.assertRaises(CorruptError):
            tarsnap.archive_find(self.remote(), self.store.live, b'one', None)


if __name__ == '__main__':
    unittest.main()
