# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap-recrypt moves every archive, and never loses one.

Most tests run client and tool in this process against an embedded store, so
that one of them can end the program at each thing it does; the last use
processes, and servers over TLS.
"""

import contextlib
import io
import itertools
import os
import shutil
import sqlite3
import sys
import unittest
from unittest import mock

import keygen
import lab
import tarsnap
import test_keygen
import world
from test_e2e_interrupt import Trigger
from world import COMMIT, COMMITTED, CUT, PASS, PUT, TEAR

R, W, D, N = lab.R, lab.W, lab.D, lab.N


class Moving(lab.LabTest):
    """A lab whose second host, `heir`, has a keyregen'ed key."""

    def setUp(self):
        super().setUp()
        self.heir = self.lab.host('b', key=self.regen(self.host.key))

    def regen(self, old):
        """The full key of a new machine in this lab, made from `old`."""
        key = keygen.key_regen(old, self.lab.store, 'heir')
        keygen.machine_make(key, tarsnap.TRANSPORT_DIR, '', b'', [])
        return key

    def fill(self):
        """Three archives: files of every size, many pages, shared content."""
        with lab.fine():
            for number in range(40):
                self.write('dir/file%02d' % number, os.urandom(200 * number))
            self.write('dir/empty')
            self.write('twin', b'same' * 300)
            os.symlink('twin', os.path.join(self.lab.tree, 'link'))
            self.host.create('home-2026-01-01')
            self.models = {'home-2026-01-01': lab.snapshot(self.lab.tree)}
            self.write('twin', b'other' * 300)
            self.write('dir/file05', os.urandom(20000))
            self.host.create('home-2026-01-02', '--creationtime=1700000000')
            self.models['home-2026-01-02'] = lab.snapshot(self.lab.tree)
            self.host.good('-c', '-f', 'caf\u00e9 \t x', '-C', self.lab.tree,
                           'dir')

    def words(self, old=None, new=None, **changes):
        old, new = old or self.host, new or self.heir
        options = {'oldkey': old.keyfile, 'oldcachedir': old.cache,
                   'newkey': new.keyfile, 'newcachedir': new.cache}
        options.update(changes)
        return [word for name, value in options.items()
                for word in ('--' + name, value)]

    def recrypt(self, *more, status=0, says='', **changes):
        """Run the tool here; what it said on standard output."""
        with lab.no_fsync(), contextlib.redirect_stderr(io.StringIO()) as err:
            said = []
            with mock.patch.object(keygen, 'step', said.append):
                found = keygen.recrypt_main(self.words(**changes)
                                            + list(more))
        text = err.getvalue()
        self.assertEqual(found, status, text)
        self.assertIn(says, text)
        self.assertNotIn('internal error', text)
        if status:
            lines = [line for line in text.splitlines()
                     if not line.startswith('Directory ')]
            self.assertTrue(lines[0].startswith('tarsnap-recrypt: '), text)
        return said

    def names(self, host):
        return sorted(host.good('--list-archives', cache=False
                                ).out.splitlines())

    def states(self, host):
        """The state of each of its archives."""
        remote = tarsnap.Remote(host.key, [R])
        try:
            return [row[2] for row in tarsnap.history_live(
                remote, tarsnap.Settings()).values()]
        finally:
            remote.close()

    def stats(self, host):
        return host.good('--print-stats', '--no-humanize-numbers').out

    def check_moved(self):
        """All is as it was, under the new key, and nothing is left."""
        for name, model in self.models.items():
            self.heir.check(name, model)
        self.assertEqual(self.names(self.host), [])
        self.assertLessEqual(set(self.models), set(self.names(self.heir)))


class Whole(Moving):
    def test_every_archive_restores_and_nothing_is_left(self):
        self.fill()
        listed = self.host.good('--list-archives', '-vv').out
        contents = [self.host.good('-tv', '-f', name).out
                    for name in self.models]
        tar = self.host.good('-t', '-f', 'caf\u00e9 \t x').out
        before = self.stats(self.host)
        said = self.recrypt()
        self.check_moved()
        self.assertEqual(self.heir.good('--list-archives', '-vv').out, listed)
        self.assertEqual([self.heir.good('-tv', '-f', name).out
                          for name in self.models], contents)
        self.assertEqual(self.heir.good('-t', '-f', 'caf\u00e9 \t x').out,
                         tar)
        with self.subTest('each step on stdout, [i/n]'):
            self.assertIn('Copying archive [2/3]', ' '.join(said))
        with self.subTest('statistics'):
            self.check_statistics(before)

    def check_statistics(self, before):
        """As the old machine's, but for what sealing records anew costs."""
        after = self.stats(self.heir)
        for old, new in zip(before.splitlines()[1:], after.splitlines()[1:]):
            self.assertEqual(old.split()[:-1], new.split()[:-1])
            self.assertLess(abs(int(old.split()[-1]) - int(new.split()[-1])),
                            3 * 200)
        self.heir.good('--fsck')
        self.assertEqual(self.stats(self.heir), after)
        self.assertRegex(self.stats(self.host),
                         r'All archives +0 +0\n.*unique data\) +0 +0\n')

    def test_series_creation_argv_host_are_kept(self):
        self.fill()
        key = self.host.key

        def facts(host):
            remote = tarsnap.Remote(host.key, [R])
            opt = tarsnap.Settings()
            try:
                live = tarsnap.history_live(remote, opt)
                return {archive: keygen.facts(record, live[archive][2])
                        for archive, record in tarsnap.archive_records(
                            remote, live, self.fail)}
            finally:
                remote.close()

        before = facts(self.host)
        self.recrypt()
        self.assertEqual(facts(self.heir), before)
        self.assertEqual(len({row[1] for row in before.values()}), 2)
        self.assertIn(tarsnap.Names(key).series(b'home-#'),
                      {row[1] for row in before.values()})

    def test_the_next_backup_sends_nothing_that_is_there(self):
        self.fill()
        self.recrypt()
        with lab.fine():
            out = self.heir.create('third', '--print-stats',
                                   '--no-humanize-numbers').err
        new = [line for line in out.splitlines() if 'New data' in line][0]
        self.assertLess(int(new.split()[-1]), 3000, out)

    def test_the_next_backup_reads_what_has_changed(self):
        self.fill()
        self.recrypt()
        self.write('dir/file07', b'new')
        real, read = tarsnap.Writer.read, []

        def reading(writer, folder, name, member, *rest):
            read.append(member)
            return real(writer, folder, name, member, *rest)

        with lab.fine(), mock.patch.object(tarsnap.Writer, 'read', reading):
            self.heir.create('third')
        # And those of a chunk that has become too empty to keep.
        self.assertIn(b'./dir/file07', read)
        self.assertLess(len([member for member in read
                             if b'file' in member]), 5)
        self.heir.check('third', lab.snapshot(self.lab.tree))

    def test_a_key_that_was_regenerated_twice(self):
        self.fill()
        self.recrypt()
        third = self.lab.host('c', key=self.regen(self.heir.key))
        with self.subTest('grandchildren are not children'):
            self.recrypt(new=third, status=1, says='not made from')
        self.recrypt(old=self.heir, new=third)
        for name, model in self.models.items():
            third.check(name, model)

    def test_nothing_to_move(self):
        os.mkdir(self.host.cache)
        self.assertIn('nothing to move', self.recrypt()[-1])

    def test_twice(self):
        self.fill()
        self.recrypt()
        self.assertIn('nothing to move', self.recrypt()[-1])
        self.check_moved()

    def test_part_archives(self):
        """A dead run's checkpoint is kept as .part, and as incomplete."""
        self.fill()
        self.part_make('.own', self.host)
        elsewhere = self.lab.host('elsewhere')
        elsewhere.good('--fsck')
        self.part_make('.far', elsewhere)
        contents = {name: self.host.good('-t', '-f', name, cache=False,
                                         status=1).out
                    for name in ('.own.part', '.far.part')}
        self.recrypt()
        for name, listed in contents.items():
            self.assertIn('dir/file', listed)
            done = self.heir.good('-t', '-f', name, status=1)
            self.assertEqual(done.out, listed)
            self.assertIn('Truncated', done.err)
        self.assertEqual(sorted(self.states(self.heir)),
                         [tarsnap.PARTIAL] * 2 + [tarsnap.COMPLETE] * 3)
        self.assertEqual(self.names(self.host), [])

    def part_make(self, name, host):
        """Leave the checkpoint of a run that died."""
        real, due = tarsnap.Create.checkpoint, iter([False] * 20 + [True])

        def checkpoint(*args):
            real(*args)
            os._exit(7)

        with mock.patch.object(tarsnap.Create, 'checkpoint', checkpoint), \
                mock.patch.object(tarsnap.Create, 'due',
                                  lambda create: next(due, True)):
            self.write('fresh' + name, os.urandom(3000))
            self.assertEqual(self.lab.crash(
                host, contextlib.nullcontext(), '-c', '-f', name, '-C',
                self.lab.tree, '.'), 7)


class Refusals(Moving):
    """Nothing is moved, nothing deleted, and one line says why."""

    def setUp(self):
        super().setUp()
        self.write('file', b'precious')
        self.host.create('only')

    def refused(self, says, *more, **changes):
        said = self.recrypt(*more, status=1, says=says, **changes)
        self.assertFalse([text for text in said if 'Deleting' in text])
        self.assertEqual(self.names(self.host), ['only'])

    def test_unrelated_key(self):
        other = self.lab.host('c', key=lab.register(self.lab.store))
        self.refused('not made from', new=other)
        with self.subTest('even if it says that it is'):
            other.key.parent = self.host.key.public_hash()
            liar = self.lab.host('d', key=other.key)
            self.refused('not made from', new=liar)

    def test_the_same_key(self):
        self.refused('not made from', new=self.host,
                     newcachedir=self.heir.cache)

    def test_keys_the_wrong_way_round(self):
        self.refused('not made from', old=self.heir, new=self.host)

    def test_one_cache_directory_for_both(self):
        self.refused('a cache directory each', newcachedir=self.host.cache)
        link = self.lab.path('link')
        os.symlink(self.host.cache, link)
        self.refused('a cache directory each', newcachedir=link)

    def test_missing_roles(self):
        for roles, old, word in (
                ((W, D, N), True, 'read'), ((R, W, D), True, 'nuke'),
                ((R, D, N), False, 'write'), ((W, D, N), False, 'read')):
            with self.subTest(word, old=old):
                host = self.lab.host('cut-%s%s' % (word, old), roles, (
                    self.host if old else self.heir).key)
                changes = {'oldkey' if old else 'newkey': host.keyfile}
                self.refused('The %s authorization is not in key file %s'
                             % (word, host.keyfile), **changes)

    def test_a_delete_key_will_do_for_the_old(self):
        host = self.lab.host('cut', (R, D, N))
        shutil.copytree(self.host.cache, host.cache, symlinks=True)
        self.recrypt(old=host)
        self.assertEqual(self.names(self.heir), ['only'])

    def test_new_machine_with_other_archives(self):
        self.heir.create('only')
        self.refused('not a copy')
        self.heir.good('-d', '-f', 'only')
        self.heir.create('another')
        self.refused('another')
        self.assertEqual(self.names(self.heir), ['another'])

    def test_old_cache_directory(self):
        self.refused('There is no cache directory',
                     oldcachedir=self.lab.path('nowhere'))
        self.assertFalse(os.path.exists(self.lab.path('nowhere')))
        os.mkdir(self.lab.path('empty'))
        self.refused('--fsck', oldcachedir=self.lab.path('empty'))

    def test_damaged_cache_directories(self):
        path = os.path.join(self.host.cache, 'directory')
        shutil.copy(path, self.lab.path('saved'))
        with open(path, 'r+b') as file:
            file.write(bytes(4096))
        self.refused('cache directory')
        shutil.copy(self.lab.path('saved'), path)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("DELETE FROM blocks WHERE cls = 'c'")
            db.commit()
        # What the cache lacks is still read, from the pages.
        self.recrypt()
        self.heir.check('only', lab.snapshot(self.lab.tree))

    def test_an_archive_missing_in_the_cache(self):
        """The history tells which there are, not the cache directory."""
        path = os.path.join(self.host.cache, 'directory')
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute('DELETE FROM archives')
            db.commit()
        self.recrypt()
        self.heir.check('only', lab.snapshot(self.lab.tree))

    def test_locked(self):
        lock = tarsnap.cachedir_lock(self.host.cache)
        self.addCleanup(os.close, lock)
        pid = os.fork()             # locks are between processes
        if not pid:
            status = 1
            try:
                self.refused('Transaction already in progress')
                status = 0
            finally:
                os._exit(status)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)

    def test_damaged_block_on_the_old_machine(self):
        """Neither machine loses anything; the block is named."""
        real = keygen.Resealer.decode

        def decode(fetcher, kid, body):
            if kid.cls == tarsnap.CHUNK:
                body = body[:-1] + bytes([body[-1] ^ 1])
            return real(fetcher, kid, body)

        with mock.patch.object(keygen.Resealer, 'decode', decode):
            self.refused('block ')
        self.assertEqual(self.names(self.heir), [])

    def test_an_archive_that_was_not_copied_after_all(self):
        with mock.patch.object(keygen, 'archive_copy'):
            self.refused('lacks')

    def test_what_was_copied_cannot_be_read_back(self):
        """Verified before anything is deleted: chunks, pages, all."""
        real = tarsnap.Fetcher.decode
        for cls in (tarsnap.CHUNK, tarsnap.INDEX):
            def decode(fetcher, kid, body, cls=cls):
                if type(fetcher) is tarsnap.Fetcher and kid.cls == cls:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                return real(fetcher, kid, body)

            with self.subTest(cls), mock.patch.object(
                    tarsnap.Fetcher, 'decode', decode):
                self.refused('block ')

    def test_somebody_adds_to_the_old_machine_meanwhile(self):
        """The last commit is refused; what is new is moved as well."""
        real, late = keygen.verify, self.lab.host('late')
        late.good('--fsck')
        again = iter((True, False))

        def verify(*args):
            real(*args)
            if next(again):
                late.create('late')

        with mock.patch.object(keygen, 'verify', verify):
            said = self.recrypt()
        self.assertIn('The old machine has changed meanwhile', said)
        self.assertEqual(self.names(self.heir), ['late', 'only'])
        self.assertEqual(self.names(self.host), [])


class Killed(Moving):
    """Ended at each frame and each write to disk, then run again."""

    def fill(self):
        """Two archives of a few blocks each."""
        for name in ('one', 'two', 'three'):
            self.write(name, os.urandom(40000))
        self.host.create('first')
        self.models = {'first': lab.snapshot(self.lab.tree)}
        self.write('four', b'4444')
        self.host.create('second')
        self.models['second'] = lab.snapshot(self.lab.tree)

    def test_at_every_step(self):
        self.fill()
        for host in (self.host, self.heir):
            os.makedirs(host.cache, exist_ok=True)
        for path in (self.lab.store, self.host.cache, self.heir.cache):
            shutil.copytree(path, path + '.start', symlinks=True)
        steps = 0
        for steps in itertools.count(1):
            if self.run_killed(steps) == 0:
                break
            with self.subTest(step=steps):
                self.check_step(steps)
            self.start_over()
        self.assertGreater(steps, 30)
        print('killed at %d places' % (steps - 1))

    def start_over(self):
        for path in (self.lab.store, self.host.cache, self.heir.cache):
            shutil.rmtree(path)
            shutil.copytree(path + '.start', path, symlinks=True)

    def check_step(self, number):
        """One machine has all, and running again moves the rest."""
        old, new = len(self.states(self.host)), len(self.states(self.heir))
        self.assertIn((old, new), ((2, 0), (2, 1), (2, 2), (0, 2)))
        self.recrypt()
        if number % 8 == 0 or not old:
            self.check_moved()
        else:
            self.assertEqual(len(self.states(self.host)), 0)
            self.assertEqual(len(self.states(self.heir)), 2)

    def run_killed(self, most):
        """Run in a child that dies at thing number `most`; its status."""
        lab.alone()
        pid = os.fork()
        if not pid:
            status = 99
            try:
                with died_at(most):
                    self.recrypt()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.assertIn(status, (0, 9))
        return status


@contextlib.contextmanager
def died_at(most):
    """End the process before the `most`-th frame, commit of a cache
    directory, or change of what is sealed in `pending`.
    """
    count = itertools.count(1)

    def counting(real):
        def call(*args, **options):
            if next(count) == most:
                os._exit(9)
            return real(*args, **options)
        return call

    with contextlib.ExitStack() as stack:
        for owner, names in ((tarsnap.Channel, ('post', 'push')),
                             (tarsnap.Cache, ('apply', 'publish',
                                              'catch_up')),
                             (tarsnap.Pending, ('seal', 'remove'))):
            for name in names:
                stack.enter_context(mock.patch.object(
                    owner, name, counting(getattr(owner, name))))
        yield


class Processes(unittest.TestCase):
    """As its users run it."""

    def test_between_two_servers(self):
        """Over TLS, from a directory to a server, passphrases and all."""
        w = world.World(self, 'tls')
        world.write(w.path('one'), b'first\n')
        old = w.path('old')
        done = w.tool('keygen', '--keyfile', old, '--machine', 'old',
                      '--server', w.path('store'), '--new-passphrase',
                      'file:' + w.path('one'), *QUICK)
        self.assertEqual(done.code, 0, done)
        w.key = old
        tree = w.path('tree')
        world.tree_small(tree, 5)
        w.ok('-c', '-f', 'a', '--passphrase', 'file:' + w.path('one'),
             '-C', tree, '.')
        new = w.path('new')
        done = w.tool('keyregen', '--keyfile', new, '--oldkey', old,
                      '--machine', 'heir', '--server', w.address, '--user',
                      world.USER, '--fingerprint', w.server.pin,
                      '--passphrase', 'file:' + w.path('one'),
                      '--passphrased', *QUICK,
                      give=world.PASSWORD.encode() + b'\ntwo\ntwo\n')
        self.assertEqual(done.code, 0, done)
        words = ['recrypt', '--oldkey', old, '--oldcachedir', w.path('cache'),
                 '--newkey', new, '--newcachedir', w.path('new-cache')]
        with self.subTest('old key passphrase first, then new'):
            status, output = test_keygen.drive(
                test_keygen.KEYGEN[:-1] + words,
                [('passphrase for keyfile %s: ' % old, b'first\n'),
                 ('passphrase for keyfile %s: ' % new, b'wrong\n'),
                 ('Passphrase is incorrect', b'')])
            self.assertEqual(status, 1, output)
        done = w.tool(*words, give=b'first\ntwo\n', start_new_session=True)
        self.assertEqual(done.code, 0, done)
        where = w.extract('a', '--passphrase', 'env:WORD', key=new,
                          cache=None, env=dict(w.environment, WORD='two'))
        world.tree_equal(self, tree, where)
        done = w.ok('--list-archives', '--passphrase', 'file:'
                    + w.path('one'), key=old, cache=None)
        self.assertEqual(done.out, '')


class Network(unittest.TestCase):
    """Over TLS, with a Front between; every case moves on to a new key."""

    def setUp(self):
        w = self.world = world.World(self, 'front')
        self.seed = world.seed_choose('test_recrypt.Network')
        self.tree = w.path('tree')
        world.tree_small(self.tree, self.seed)
        world.tree_noise(self.tree + '/noise', self.seed, 1)
        self.key, self.number = w.keygen(), 0
        self.cache = w.path('cache')
        w.ok('-c', '-f', 'one', '-C', self.tree, '.')
        w.ok('-c', '-f', 'two', '-C', self.tree, 'noise')

    def begin(self):
        """A new key to move to; the words that do it."""
        self.number += 1
        new = self.world.path('key%d' % self.number)
        done = self.world.tool(
            'keyregen', '--keyfile', new, '--oldkey', self.key, '--machine',
            'm', '--user', world.USER, give=world.PASSWORD.encode())
        self.assertEqual(done.code, 0, done)
        cache = self.world.path('cache%d' % self.number)
        words = [sys.executable, self.world.program('keygen'),
                 'recrypt', '--oldkey', self.key, '--oldcachedir', self.cache,
                 '--newkey', new, '--newcachedir', cache]
        self.old, self.key, self.cache = self.key, new, cache
        return words

    def moved(self, done):
        self.assertEqual(done.code, 0, done)
        w = self.world
        self.assertEqual(w.names(key=self.old, cache=None), [])
        self.assertEqual(w.names(key=self.key, cache=None), ['one', 'two'])

    def whole(self):
        where = self.world.extract('one', key=self.key, cache=None)
        world.tree_equal(self, self.tree, where)

    def test_connection_lost(self):
        """The run goes on by itself, whatever was lost with it."""
        w = self.world
        for moment in ((PUT, 3, CUT), (BLOCK, 2, CUT), (NUKE, 1, TEAR),
                       (COMMITTED, 3, CUT)):
            with self.subTest(moment):
                words = self.begin()
                w.front.hook = trigger = Trigger(
                    *moment[:2], lambda: None, moment[2])
                self.moved(w.run(words))
                self.assertTrue(trigger.done.is_set())
        self.whole()

    def test_killed(self):
        """Running it again does the rest."""
        w = self.world
        for kind, count, what in ((COMMIT, 2, PASS), (NUKE, 1, PASS)):
            with self.subTest(kind, what=what):
                words, running = self.begin(), None
                w.front.hook = Trigger(
                    kind, count, lambda: running.process.kill(), what)
                running = w.spawn(words)
                self.assertEqual(running.wait().code, -9)
                w.front.hook = world.pass_all
                self.moved(w.run(words))
        self.whole()


BLOCK, NUKE = tarsnap.BLOCK, tarsnap.NUKE
QUICK = '--passphrase-time', '0.05', '--passphrase-mem', '1M'


if __name__ == '__main__':
    unittest.main()
