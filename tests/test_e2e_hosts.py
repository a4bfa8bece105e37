# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Several hosts on one key: nobody's archive loses a block to another's work.

What one host does while another is in mid-backup is done by the Front, at a
frame of the other's connection; so these are not races but examples.
"""

import os
import threading
import unittest

import world
from world import BEGIN, COMMIT, COMMITTED, DELETE, PASS, PUT


class Between:
    """Runs `action` in the thread of the first connection that has `count`
    frames of `kind`; that connection waits, all others go on.
    """

    def __init__(self, kind, count, action):
        self.kind = kind
        self.left = count
        self.action = action
        self.wire = None
        self.done = None            # what action() returned
        self.lock = threading.Lock()

    def __call__(self, wire, up, kind, body):
        if kind != self.kind:
            return PASS
        with self.lock:
            self.left -= 1
            now = self.left == 0
        if now:
            self.done = self.action()
        return PASS


class Hosts(unittest.TestCase):

    def setUp(self):
        self.seed = world.seed_choose(self.id().rpartition('.')[2])
        self.world = w = world.World(self, 'front')
        self.front = w.front
        w.keygen()
        world.tree_small(w.path('tree'), self.seed)
        world.tree_noise(w.path('one'), self.seed + 1, 2)
        world.tree_noise(w.path('two'), self.seed + 2, 2)

    def host(self, name):
        """Arguments that make a command run on a host of that name."""
        return {'cache': self.world.path('cache-' + name)}

    def create(self, archive, *trees, **options):
        return self.world.ok('-c', '--print-stats', '-f', archive, '-C',
                             self.world.root, *trees, **options)

    def delete(self, archive, **options):
        return self.world.ok('-d', '-f', archive, **options)

    def during(self, kind, count, action, *args, **options):
        """Run a command, and `action` at the n-th frame of a kind."""
        self.front.hook = between = Between(kind, count, action)
        done = self.world.tarsnap(*args, **options)
        self.front.hook = world.pass_all
        self.assertIsNotNone(between.done, done)
        return done

    def whole(self, archive, *trees):
        where = self.world.extract(archive)
        for tree in trees:
            world.tree_equal(self, self.world.path(tree),
                             os.path.join(where, tree))

    def same_statistics(self, *hosts):
        """All hosts, caught up, and one made anew agree."""
        hosts += (dict(self.host('fresh')),)
        self.world.ok('--fsck', **hosts[-1])
        figures = []
        there = self.world.names()[0]
        for options in hosts[:-1]:
            # A write key cannot delete; it finds that the name is taken.
            if self.world.tarsnap('-d', '--keep-going', '-f', 'no such',
                                  **options).code:
                self.world.tarsnap('-c', '-f', there, '-C', self.world.root,
                                   'tree', **options)
        for options in hosts:
            figures.append(self.world.ok('--print-stats', **options).out)
        self.assertEqual(figures, figures[-1:] * len(figures))

    def test_hosts_take_turns(self):
        a, b = self.host('a'), self.host('b')
        self.create('a1', 'tree', 'one', **a)
        self.world.ok('--fsck', **b)
        # What one stored the other need not send.
        done = self.create('b1', 'tree', 'two', **b)
        self.assertLess(done.numbers('New data')[0], 2.2 * 10 ** 6)
        done = self.create('a2', 'tree', 'two', **a)
        self.assertLess(done.numbers('New data')[0], 30000)
        self.delete('a1', **b)
        done = self.create('a3', 'tree', 'one', **a)
        self.assertGreater(done.numbers('New data')[0], 2 * 10 ** 6)
        self.delete('b1', **a)
        self.create('b2', 'one', **b)
        self.assertEqual(self.world.names(), ['a2', 'a3', 'b2'])
        self.whole('a2', 'tree', 'two')
        self.whole('a3', 'tree', 'one')
        self.whole('b2', 'one')
        self.same_statistics(a, b)
        for name in ('a2', 'a3', 'b2'):
            self.delete(name, **b)
        stat = self.world.server.stat()
        self.assertEqual((stat['archives'], stat['blocks'], stat['bytes']),
                         (0, 0, 0))

    def borrowed_meets_deleted(self, kind, count, flags):
        """A pruning host deletes what a writing host is about to use."""
        w = self.world
        write = dict(self.host('write'), key=w.subset('write', '-w'))
        prune = dict(self.host('prune'), key=w.subset('prune', *flags))
        self.create('base', 'tree', 'one', **write)
        w.ok('--fsck', **prune)
        done = self.during(
            kind, count, lambda: self.delete('base', **prune),
            '-c', '--print-stats', '-f', 'next', '-C', w.root, 'tree', 'one',
            'two', **write)
        self.assertEqual((done.code, done.err.count('Error')), (0, 0), done)
        self.assertEqual(w.names(), ['next'])
        self.whole('next', 'tree', 'one', 'two')
        self.same_statistics(write, prune)
        # And the next time all of it is there to be used.
        done = self.create('third', 'tree', 'one', 'two', **write)
        self.assertLess(done.numbers('New data')[0], 3000)
        self.delete('next', **prune)
        self.whole('third', 'tree', 'one', 'two')

    def test_borrowed_meets_deleted_in_mid_backup(self):
        self.borrowed_meets_deleted(PUT, 5, ['--prune'])

    def test_borrowed_meets_deleted_at_the_commit(self):
        self.borrowed_meets_deleted(COMMIT, 1, ['-d'])

    def test_borrowed_meets_deleted_before_the_first_put(self):
        self.borrowed_meets_deleted(BEGIN, 1, ['--prune'])

    def test_conflict_without_overlap_signs_again(self):
        w = self.world
        a, b = self.host('a'), self.host('b')
        self.create('old', 'two', **a)
        w.ok('--fsck', **b)

        def meanwhile():
            self.create('other', 'tree', **b)
            return self.delete('old', **b)

        before = len(self.front.puts())
        done = self.during(PUT, 8, meanwhile, '-c', '--print-stats', '-f',
                           'mine', '-C', w.root, 'one', **a)
        self.assertEqual(done.code, 0, done)
        puts = self.front.puts()[before:]
        # Twice only what names the base: the record, which is a new one.
        self.assertEqual(len(puts), len(set(puts)))
        self.assertEqual(self.front.twice, [])
        self.assertEqual(w.names(), ['mine', 'other'])
        self.whole('mine', 'one')
        self.whole('other', 'tree')
        self.same_statistics(a, b)

    def test_same_name_at_the_same_time(self):
        w = self.world
        a, b = self.host('a'), self.host('b')
        done = self.during(
            PUT, 3, lambda: self.create('name', 'two', **b),
            '-c', '-f', 'name', '-C', w.root, 'one', **a)
        self.assertEqual(done.code, 1)
        self.assertRegex(done.err, r'\Atarsnap: An archive already exists '
                                   r'with the name "name"\n')
        self.assertEqual(w.names(), ['name'])
        self.whole('name', 'two')
        self.create('another', 'one', **a)
        self.whole('another', 'one')

    def test_same_data_at_the_same_time(self):
        w = self.world
        a, b = self.host('a'), self.host('b')
        done = self.during(
            PUT, 6, lambda: self.create('b', 'one', 'tree', **b),
            '-c', '-f', 'a', '-C', w.root, 'one', 'tree', **a)
        self.assertEqual(done.code, 0, done)
        self.same_statistics(a, b)
        self.delete('b', **a)
        self.whole('a', 'one', 'tree')
        self.delete('a', **b)
        self.assertEqual(w.server.stat()['blocks'], 0)

    def test_backup_while_deleting(self):
        # The deleting host's set holds what the new archive uses.
        w = self.world
        a, b = self.host('a'), self.host('b')
        self.create('old', 'tree', 'one', **a)
        w.ok('--fsck', **b)
        for number, kind in enumerate((DELETE, COMMIT)):
            name = 'new%d' % number
            done = self.during(
                kind, 1, lambda name=name: self.create(name, 'tree', 'two',
                                                       **b),
                '-d', '-f', 'old' if not number else 'new0', **a)
            self.assertEqual(done.code, 0, done)
            self.assertEqual(w.names(), [name])
            self.whole(name, 'tree', 'two')
            self.same_statistics(a, b)

    def test_two_delete_at_the_same_time(self):
        w = self.world
        a, b = self.host('a'), self.host('b')
        for name in ('x', 'y', 'z'):
            self.create(name, 'tree', 'one', **a)
        w.ok('--fsck', **b)
        done = self.during(COMMIT, 1, lambda: self.delete('y', **b),
                           '-d', '-f', 'x', **a)
        self.assertEqual(done.code, 0, done)
        self.whole('z', 'tree', 'one')
        # The same one: somebody did it, so one of them has nothing to do.
        done = self.during(COMMIT, 1, lambda: self.delete('z', **b),
                           '-d', '-f', 'z', **a)
        self.assertEqual((done.code, done.lines[0]), (
            1, 'tarsnap: Archive does not exist: z'))
        self.assertEqual(w.server.stat()['blocks'], 0)

    def test_nuke_in_mid_backup(self):
        w = self.world
        a = self.host('a')
        self.create('old', 'tree', 'one', **a)
        done = self.during(
            PUT, 4, lambda: w.ok('--nuke', give=b'No Tomorrow\n', cache=None),
            '-c', '-f', 'new', '-C', w.root, 'tree', 'one', 'two', **a)
        self.assertEqual(done.code, 0, done)
        self.assertEqual(w.names(), ['new'])
        self.whole('new', 'tree', 'one', 'two')
        self.same_statistics(a)

    def after_checkpoint(self, action):
        """Runs of `new`: `action` happens some PUTs after a checkpoint."""
        w, seen = self.world, []
        world.tree_pages(w.path('many'), self.seed + 3)

        def hook(wire, up, kind, body):
            if kind == COMMITTED and not seen:
                seen.append(wire)
            elif kind == PUT and seen[:1] == [wire]:
                seen.append(kind)
                if len(seen) == 3:
                    action()
            return PASS

        self.front.hook = hook
        done = w.tarsnap('-c', '-f', 'new', '--checkpoint-bytes', '1000000',
                         '-C', w.root, 'many', **self.host('a'))
        self.front.hook = world.pass_all
        self.assertGreater(len(seen), 3)
        self.assertEqual(done.code, 0, done)
        self.assertEqual(w.names(), ['new'])
        self.whole('new', 'many')
        self.same_statistics(self.host('a'))

    def test_checkpoint_is_deleted_meanwhile(self):
        def action():
            self.world.ok('--fsck', **self.host('b'))
            self.delete('new.part', **self.host('b'))
        self.after_checkpoint(action)

    def test_nuke_after_a_checkpoint(self):
        self.after_checkpoint(lambda: self.world.ok(
            '--nuke', give=b'No Tomorrow\n', cache=None))

    def test_fsck_with_a_write_key(self):
        w = self.world
        write = dict(self.host('write'), key=w.subset('write', '-w'))
        self.create('base', 'tree', 'one')
        w.ok('--fsck', **write)
        done = self.create('next', 'tree', 'one', **write)
        self.assertLess(done.numbers('New data')[0], 100000)
        self.whole('next', 'tree', 'one')
        self.same_statistics(write)
        # It cannot list, read or delete.
        for args in (['--list-archives'], ['-t', '-f', 'base'],
                     ['-d', '-f', 'base']):
            done = w.tarsnap(*args, **write)
            self.assertEqual((done.code, done.out), (1, ''))
            self.assertIn('authorization', done.lines[0])

    def test_several_deletes_in_one_run(self):
        w = self.world
        for number in range(4):
            world.write(w.path('tree', 'changes'), b'%d' % number * 50000)
            self.create('n%d' % number, 'tree')
        done = w.ok('-d', '-v', '--print-stats', '-f', 'n0', '-f', 'n1',
                    '-f', 'n2')
        self.assertEqual(done.err.count('Deleting archive'), 3)
        self.assertEqual(w.names(), ['n3'])
        self.whole('n3', 'tree')
        done = w.tarsnap('-d', '-f', 'n3', '-f', 'no such')
        self.assertEqual(done.code, 2, done)
        self.assertEqual(w.names(), [])
        self.assertEqual(w.server.stat()['blocks'], 0)


if __name__ == '__main__':
    unittest.main()
