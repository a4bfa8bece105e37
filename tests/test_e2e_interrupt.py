# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Killed and cut at any frame: a backup goes on, comes whole, is sent once.

A Front between client and server decides by frame, not by time, when the
server dies, the wire is cut, or the client is killed.
"""

import os
import random
import signal
import threading
import time
import unittest

import world
from world import (BEGIN, CHECKPOINT, COMMIT, COMMITTED, CUT, DROP, MIB, PASS,
                   PUT, TEAR)


class Trigger:
    """Calls `action` once, in the Front's thread, at the n-th frame of a
    kind; until then every frame passes.
    """

    def __init__(self, kind, count, action, what=PASS):
        self.kind = kind
        self.left = count
        self.action = action
        self.what = what            # becomes of that frame
        self.done = threading.Event()

    def __call__(self, wire, up, kind, body):
        if kind != self.kind or self.done.is_set():
            return PASS
        self.left -= 1
        if self.left:
            return PASS
        self.done.set()
        self.action()
        return self.what


class Interrupt(unittest.TestCase):

    def setUp(self):
        self.seed = world.seed_choose(self.id().rpartition('.')[2])
        self.dice = random.Random(self.seed)
        self.world = world.World(self, 'front')
        self.front = self.world.front
        self.world.keygen()

    def tree(self, name, megabytes=12):
        """A directory of chunks, some with a share in one, some lists."""
        path = self.world.path(name)
        world.tree_noise(path, self.dice.random(), megabytes)
        for number in range(30):
            world.write(os.path.join(path, 'small', '%d' % number),
                        world.noise(3000, self.dice.random()))
        return path

    def create(self, name, tree, *args):
        return self.world.start('-c', '-f', name, *args, '-C',
                                self.world.root, tree)

    def whole(self, name, tree):
        """The archive is there once, and is the tree."""
        self.assertEqual(self.world.names().count(name), 1)
        world.tree_equal(self, self.world.path(tree), os.path.join(
            self.world.extract(name), tree))

    def reached(self, trigger, running):
        """Wait for the trigger; the command must not end before."""
        end = time.monotonic() + world.SECONDS
        while not trigger.done.wait(0.02):
            if running.process.poll() is not None or time.monotonic() > end:
                self.fail('ended too early: %r' % running.wait())

    # The server.

    def test_server_killed_in_mid_backup(self):
        for number, moment in enumerate(self.dice.sample(range(1, 60), 3)):
            tree = 'tree%d' % number
            self.tree(tree)
            self.front.hook = trigger = Trigger(PUT, moment, lambda: None)
            running = self.create(tree, tree)
            self.reached(trigger, running)
            self.world.server.restart()
            done = running.wait()
            self.assertEqual((done.code, done.err.count('Error')), (0, 0),
                             (moment, done))
            self.whole(tree, tree)
        self.assertEqual(self.world.server.stat()['archives'], 3)

    def test_server_ended_in_mid_backup(self):
        self.tree('tree')
        self.front.hook = trigger = Trigger(PUT, 30, lambda: None)
        running = self.create('tree', 'tree')
        self.reached(trigger, running)
        done = self.world.server.kill(signal.SIGTERM)
        self.assertEqual((done.code, done.out), (0, ''), done)
        self.assertNotIn('Traceback', done.err)
        self.world.server.start()
        done = running.wait()
        self.assertEqual(done.code, 0, done)
        self.whole('tree', 'tree')
        # A server that ends in order has kept what it received.
        self.assertEqual(self.front.twice, [])

    def spool_wipe(self):
        """What a server had not stored for good yet is lost."""
        spool = os.path.join(self.world.server.path, 'spool')
        for top, _, files in os.walk(spool):
            for name in files:
                os.unlink(os.path.join(top, name))

    def test_server_lost_its_spool(self):
        # What is not in the client's window any more is read again.
        self.tree('tree', 24)
        self.front.hook = trigger = Trigger(PUT, 90, lambda: None)
        running = self.create('tree', 'tree')
        self.reached(trigger, running)
        self.world.server.kill()
        self.spool_wipe()
        self.world.server.start()
        done = running.wait()
        self.assertEqual((done.code, done.err), (0, ''))
        self.whole('tree', 'tree')
        stats = self.world.ok('--print-stats').out
        self.world.ok('--fsck')
        self.assertEqual(self.world.ok('--print-stats').out, stats)

    def test_server_lost_the_spool_of_a_dead_run(self):
        # Its commit is signed, and can never be made any more: another one
        # takes its number.
        self.tree('tree', 1)
        running = None
        self.front.hook = Trigger(COMMIT, 1, lambda: running.process.kill(),
                                  DROP)
        running = self.create('dead', 'tree')
        self.assertEqual(running.wait().code, -9)
        self.world.server.kill()
        self.spool_wipe()
        self.world.server.start()
        done = self.create('alive', 'tree').wait()
        self.assertEqual((done.code, done.err), (0, ''))
        self.assertEqual(self.world.names(), ['alive'])
        self.whole('alive', 'tree')
        self.assertEqual(self.world.ok('--print-head').out.split(':')[0], '2')

    def test_server_gone_for_good(self):
        self.tree('tree', 2)
        self.world.ok('-c', '-f', 'before', '-C', self.world.root, 'tree')
        self.world.server.kill()
        done = self.world.tarsnap('--list-archives')
        self.assertEqual(done.code, 1)
        self.assertRegex(done.lines[0],
                         r'^tarsnap: Too many network failures: ')
        self.assertEqual(done.lines[-1], 'tarsnap: Error exit delayed from '
                                         'previous errors.')
        self.world.server.start()
        self.whole('before', 'tree')

    # The wire.

    def test_cut_at_random_frames(self):
        self.tree('tree')
        cuts, left = 0, self.dice.randrange(10, 40)

        def hook(wire, up, kind, body):
            nonlocal cuts, left
            left -= 1
            if left or cuts >= 60:
                return PASS
            cuts, left = cuts + 1, self.dice.randrange(10, 40)
            return self.dice.choice((CUT, TEAR))

        w, self.front.hook = self.world, hook
        for args in (['-c', '-f', 'one', '-C', w.root, 'tree'],
                     ['-c', '-f', 'two', '-C', w.root, 'tree/small'],
                     ['--list-archives'], ['-t', '-f', 'one'],
                     ['-d', '-f', 'two'], ['--fsck'],
                     ['-r', '-f', 'one'],
                     ['-c', '-f', 'three', '-C', w.root, 'tree']):
            before = cuts
            done = w.tarsnap(*args)
            self.assertEqual(done.code, 0, (args, cuts - before, done))
        extracted = w.extract('one')
        print('%d cuts' % cuts)
        self.assertGreater(cuts, 5)
        world.tree_equal(self, w.path('tree'), os.path.join(extracted,
                                                            'tree'))
        self.front.hook = world.pass_all
        self.assertEqual(w.names(), ['one', 'three'])
        self.whole('three', 'tree')
        self.assertEqual(self.front.twice, [])

    def test_answer_to_commit_lost(self):
        # The commit stands, but nobody said so: the client must find out,
        # neither fail, nor find its own archive in the way, nor do it twice.
        for number, (kind, what) in enumerate((
                (COMMITTED, CUT), (COMMITTED, TEAR), (COMMIT, CUT),
                (COMMIT, TEAR))):
            name = 'tree%d' % number
            self.tree(name, 1)
            self.front.hook = trigger = Trigger(kind, 1, lambda: None, what)
            done = self.create(name, name).wait()
            self.assertTrue(trigger.done.is_set())
            self.assertEqual((done.code, done.err.count('Error')), (0, 0),
                             (kind, what, done))
            self.whole(name, name)
        self.assertEqual(self.world.ok('--print-head').out.split(':')[0], '4')

    def test_answer_to_delete_lost(self):
        self.tree('tree', 1)
        for kind, what in ((COMMITTED, CUT), (COMMIT, TEAR)):
            self.create('doomed', 'tree').wait()
            self.front.hook = trigger = Trigger(kind, 1, lambda: None, what)
            done = self.world.tarsnap('-d', '-f', 'doomed', '--print-stats')
            self.assertTrue(trigger.done.is_set())
            self.assertEqual(done.code, 0, (kind, what, done))
            self.assertGreater(done.numbers('Deleted data')[0], MIB)
            self.assertEqual(done.numbers('All archives'), (0, 0))
            self.assertEqual(self.world.names(), [])

    # The client.

    def test_client_killed_again_and_again(self):
        self.tree('tree', 20)
        self.tree('more', 2)
        moments = [(PUT, self.dice.randrange(1, 9)) for _ in range(10)]
        moments += [(BEGIN, 1), (world.BEGUN, 1), (world.CHANGES, 1),
                    (world.RECEIVED, 1), (world.RECEIVED, 2)]
        self.dice.shuffle(moments)
        for moment in moments:
            # Mostly what is still in the wire is lost with the client, or
            # all would be there before the last one is killed.
            running = None
            self.front.hook = trigger = Trigger(
                *moment, lambda: running.process.kill(),
                self.dice.choice((CUT, CUT, CUT, PASS)))
            running = self.create('tree', 'tree')
            done = running.wait()
            self.assertEqual((done.code, trigger.done.is_set()), (-9, True),
                             (moment, done))
            self.assertEqual(self.world.names(), [])
        self.front.hook = world.pass_all
        done = self.create('tree', 'tree').wait()
        self.assertEqual((done.code, done.err), (0, ''))
        self.whole('tree', 'tree')
        self.assertEqual(self.front.twice, [])
        self.assertGreater(len(self.front.kept), 50)
        # What the runs left in memory of files is right as well.
        done = self.world.ok('-c', '-f', 'again', '--print-stats', '-C',
                             self.world.root, 'tree', 'more')
        self.assertGreater(done.numbers('New data')[0], 2 * MIB)
        self.assertLess(done.numbers('New data')[0], 2.2 * MIB)
        self.whole('again', 'tree')
        self.world.ok('-d', '-f', 'tree')
        self.whole('again', 'more')

    def test_client_killed_about_the_commit(self):
        # (frame, what becomes of it, is the archive there afterwards)
        for number, (kind, what, there) in enumerate((
                (COMMITTED, DROP, True), (COMMIT, DROP, None),
                (COMMIT, PASS, True))):
            name = 'tree%d' % number
            self.tree(name, 1)
            running = None
            self.front.hook = Trigger(kind, 1,
                                      lambda: running.process.kill(), what)
            running = self.create(name, name)
            self.assertEqual(running.wait().code, -9)
            self.front.hook = world.pass_all
            # The next run decides it, whatever it is about.
            self.world.ok('-c', '-f', 'next%d' % number, '-C',
                          self.world.root, name)
            if there or name in self.world.names():
                self.whole(name, name)
            self.whole('next%d' % number, name)
            self.world.ok('-d', '-f', 'next%d' % number)
            if name in self.world.names():
                done = self.create(name, name).wait()
                self.assertEqual(done.code, 1)
                self.assertRegex(done.err, r'\Atarsnap: An archive already '
                                           r'exists with the name "%s"\n'
                                 % name)
                self.whole(name, name)
            else:
                self.assertEqual(self.create(name, name).wait().code, 0)
                self.whole(name, name)
        stats = self.world.ok('--print-stats').out
        self.world.ok('--fsck')
        self.assertEqual(self.world.ok('--print-stats').out, stats)

    def test_client_killed_while_deleting(self):
        self.tree('tree', 2)
        for number, (kind, what) in enumerate((
                (BEGIN, PASS), (world.DELETE, PASS), (COMMIT, DROP),
                (COMMIT, PASS), (COMMITTED, DROP))):
            keep, doomed = 'keep%d' % number, 'doomed%d' % number
            world.write(self.world.path('tree', 'own'),
                        world.noise(50000, self.dice.random()))
            self.create(doomed, 'tree').wait()
            world.write(self.world.path('tree', 'own'), b'not yours')
            self.create(keep, 'tree').wait()
            running = None
            self.front.hook = Trigger(kind, 1,
                                      lambda: running.process.kill(), what)
            running = self.world.start('-d', '-f', doomed)
            self.assertEqual(running.wait().code, -9)
            self.front.hook = world.pass_all
            done = self.world.tarsnap('-d', '-f', doomed)
            self.assertIn(done.code, (0, 1), done)
            if done.code:
                self.assertEqual(done.lines[0], 'tarsnap: Archive does not '
                                                'exist: ' + doomed)
            self.assertNotIn(doomed, self.world.names())
            self.whole(keep, 'tree')

    def test_client_terminated(self):
        self.tree('tree')
        self.front.hook = trigger = Trigger(PUT, 20, lambda: None)
        running = self.create('tree', 'tree')
        self.reached(trigger, running)
        running.send(signal.SIGTERM)
        done = running.wait()
        self.assertEqual((done.code, done.err.count('Traceback')),
                         (-signal.SIGTERM, 0), done)
        self.assertEqual(self.create('tree', 'tree').wait().code, 0)
        self.whole('tree', 'tree')
        self.assertEqual(self.front.twice, [])

    def test_client_interrupted_by_the_user(self):
        self.tree('tree')
        self.front.hook = trigger = Trigger(PUT, 20, lambda: None)
        running = self.create('tree', 'tree')
        self.reached(trigger, running)
        running.send(signal.SIGINT)
        done = running.wait()
        self.assertEqual((done.code, done.err.count('Traceback')),
                         (-signal.SIGINT, 0), done)
        self.assertEqual(self.world.names(), [])

    # Checkpoints.

    def killed_after_checkpoint(self):
        """A run that was killed some PUTs after its first checkpoint."""
        running, seen = None, []

        def hook(wire, up, kind, body):
            if kind == COMMITTED:
                seen.append(kind)
            elif seen and kind == PUT:
                seen.append(kind)
                if len(seen) == 6:
                    running.process.kill()
            return PASS

        self.front.hook = hook
        running = self.create('tree', 'tree', '--checkpoint-bytes',
                              '1000000')
        self.assertEqual(running.wait().code, -9)
        self.front.hook = world.pass_all

    def part_is_right(self):
        """The archive tree.part holds whole entries, then says it is cut."""
        w = self.world
        where = w.path('part%d' % w.clock)
        os.mkdir(where)
        done = w.tarsnap('-x', '-p', '-f', 'tree.part', '-C', where)
        self.assertEqual(done.code, 1)
        self.assertIn('tarsnap: Truncated input file', done.lines)
        found = world.tree_scan(os.path.join(where, 'tree'))
        source = world.tree_scan(w.path('tree'))
        self.assertGreaterEqual(len(found), 4)
        self.assertLess(len(found), len(source))
        self.assertEqual(world.tree_differences(
            {name: source[name] for name in found}, found), [])
        done = w.tarsnap('-t', '-f', 'tree.part')
        self.assertEqual((done.code, len(done.out.splitlines())),
                         (1, len(found) + 1))

    def checkpoint_tree(self):
        world.tree_pages(self.world.path('tree'), self.seed)

    def test_checkpoint_becomes_part(self):
        self.checkpoint_tree()
        self.killed_after_checkpoint()
        w = self.world
        self.assertEqual(w.names(), ['tree.part'])
        self.part_is_right()
        done = self.create('tree', 'tree').wait()
        self.assertEqual(done.code, 1, done)
        self.assertRegex(done.err, r'\Atarsnap: An archive already exists '
                                   r'with the name "tree(\.part)?"\n')
        self.part_is_right()
        # Another name: what the dead run sent is not sent again.
        self.assertEqual(self.create('other', 'tree').wait().code, 0)
        self.assertEqual(self.front.twice, [])
        self.whole('other', 'tree')
        w.ok('-d', '-f', 'tree.part')
        self.assertEqual(w.names(), ['other'])
        self.assertEqual(self.create('tree', 'tree').wait().code, 0)
        self.whole('tree', 'tree')
        self.whole('other', 'tree')

    def test_recover(self):
        self.checkpoint_tree()
        self.killed_after_checkpoint()
        w = self.world
        done = w.ok('--recover')
        self.assertEqual((done.out, done.err), ('', ''))
        self.assertEqual(w.names(), ['tree.part'])
        self.part_is_right()
        head = w.ok('--print-head').out
        w.ok('--recover')
        self.assertEqual(w.ok('--print-head').out, head)
        w.ok('-d', '-f', 'tree.part')
        self.assertEqual(w.ok('--print-stats').numbers('  (unique data)'),
                         (0, 0))

    def test_finished_run_has_no_part(self):
        self.checkpoint_tree()
        done = self.create('tree', 'tree', '--checkpoint-bytes',
                           '1000000').wait()
        self.assertEqual((done.code, done.err), (0, ''))
        self.assertGreater(sum(wire.kinds.count(CHECKPOINT)
                               for wire in self.front.wires), 1)
        self.assertEqual(self.world.names(), ['tree'])
        self.assertEqual(self.front.twice, [])
        self.whole('tree', 'tree')
        stats = self.world.ok('--print-stats').out
        self.world.ok('--fsck')
        self.assertEqual(self.world.ok('--print-stats').out, stats)
        self.world.ok('-d', '-f', 'tree')
        self.assertEqual(self.world.server.stat()['blocks'], 0)

    def test_checkpoints_and_cuts(self):
        # Both at once: the wire is cut soon after each checkpoint.
        self.checkpoint_tree()
        w, cuts, wait = self.world, 0, 0

        def hook(wire, up, kind, body):
            nonlocal cuts, wait
            if kind in (CHECKPOINT, COMMITTED) and not wait:
                wait = self.dice.randrange(1, 8)
            if wait:
                wait -= 1
                if not wait and cuts < 12:
                    cuts += 1
                    return CUT
            return PASS

        self.front.hook = hook
        done = self.create('tree', 'tree', '--checkpoint-bytes',
                           '1000000').wait()
        self.front.hook = world.pass_all
        self.assertEqual((done.code, done.err), (0, ''), cuts)
        self.assertGreater(cuts, 1)
        self.assertEqual(w.names(), ['tree'])
        self.whole('tree', 'tree')


if __name__ == '__main__':
    unittest.main()
