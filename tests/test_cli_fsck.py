# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--fsck and --fsck-prune: what they print, and what they do about damage.

Blocks are damaged in the files of the store: their bytes changed, or their
segment removed.  After each --fsck-prune the store is audited by a reader of
the format, what is left is restored, and what was lost is stored anew.
"""

import os
import random
import re
import shutil
import unittest
from unittest import mock

import lab
import tarsnap
import tarsnapd
from lab import LabTest, snapshot
from rawclient import run as operator
from test_counts import Audit, dump

PROGRESS = r"""Phase 1: .*
Phase 2: .*
Phase 3: .*
Phase 4: .*
%sPhase 5: Identifying unreferenced chunks
"""
REFUSED = 'tarsnap: Error fscking archives'


def noise(name):
    return random.Random(name).randbytes(50000)


class FsckCase(LabTest):
    """Archives `first`, `middle` and `last`; each has a file of its own, and
    each two next to each other share one.
    """

    files = {'first': ('one', 'both'), 'middle': ('two', 'both', 'more'),
             'last': ('three', 'more')}

    def setUp(self):
        super().setUp()
        self.models = {}
        for name in self.files:
            self.tree(name)
            self.models[name] = snapshot(self.lab.tree)
            self.host.create(name)

    def tree(self, name):
        """The tree of an archive, the same each time."""
        shutil.rmtree(self.lab.tree)
        os.mkdir(self.lab.tree)
        for file in self.files[name]:
            self.write(file, noise(file), 10 ** 18)
        os.utime(self.lab.tree, ns=(10 ** 18, 10 ** 18))

    # Blocks and where they lie.

    def chunk(self, file):
        return tarsnap.Names(self.lab.key).chunk(noise(file))

    def record(self, name):
        archive = tarsnap.Names(self.lab.key).archive(name.encode())
        with self.host.database() as db:
            return db.execute('SELECT record FROM archives WHERE id = ?',
                              (archive,)).fetchone()[0]

    def kids(self, block):
        with self.host.database() as db:
            packed = db.execute('SELECT kids FROM blocks WHERE name = ?',
                                (block,)).fetchone()[0]
        return [kid[1] for kid in tarsnap.KID.iter_unpack(packed)]

    def place(self, block):
        """(path of its segment, offset, length) of a block."""
        server = tarsnapd.Server(self.lab.store)
        try:
            server.run(tarsnapd.catch_up(self.lab.key.machine))
            key, offset, length, _ = server.perform((
                'index', self.lab.key.machine, 'find', [block]))[0]
            return server.store._path(key), offset, length
        finally:
            server.close()

    def damage(self, *blocks):
        """Change a bit in the middle of each."""
        for block in blocks:
            path, offset, length = self.place(block)
            os.chmod(path, 0o600)
            with open(path, 'r+b') as file:
                file.seek(offset + length // 2)
                byte = file.read(1)[0]
                file.seek(offset + length // 2)
                file.write(bytes([byte ^ 1]))

    # What is said.

    def refused(self, *args):
        """--fsck that finds damage; the archives it names."""
        result = self.host.run('--fsck', *args)
        self.assertEqual(result.status, 1)
        lines = result.err.splitlines()
        at = lines.index(REFUSED)
        self.assertIn('--fsck-prune', lines[at - 1])
        self.assertIn('Phase 5', result.out)
        return re.findall(r'Archive "(\w+)" is damaged', '\n'.join(lines))

    def pruned(self, *args, lost):
        """--fsck-prune that deletes the archives `lost`; all is well then."""
        result = self.host.good('--fsck-prune', *args)
        self.assertEqual(result.err, '')
        gone = re.findall(r'(?m)^  Deleted archive "(\w+)"$', result.out)
        if gone != ['']:
            self.assertEqual(sorted(gone), sorted(lost))
        self.assertRegex(result.out, r'(?m)^  Deleted \d+ blocks? \(\d+ ')
        self.sound([name for name in self.models if name not in lost])
        return result

    def sound(self, left):
        """The archives `left` are whole, and nothing else is stored."""
        self.assertEqual(sorted(self.host.good(
            '--list-archives', cache=False).out.split()), sorted(left))
        for name in left:
            self.host.check(name, self.models[name])
        audit = Audit(self.lab)
        self.assertEqual(audit.reachable(), set(audit.live))
        totals = self.host.meta()[2]
        self.assertEqual(totals[:4] + totals[8:], audit.statistics())
        before, head = dump(self.host), self.host.seq()
        self.host.good('--fsck', '--read-data')
        self.assertEqual((dump(self.host), self.host.seq()), (before, head))
        for name in self.models:
            if name not in left:
                self.again(name)

    def again(self, name):
        """Store a lost archive's tree anew; nothing of it is taken for
        stored that is not.
        """
        self.tree(name)
        model = snapshot(self.lab.tree)
        self.host.create(name)
        self.host.check(name, model)


class Progress(FsckCase):
    """Contract 3.10."""

    def test_phases(self):
        lines = ''.join('  Archive %d/3...\n' % n for n in (1, 2, 3))
        for args, more in (([], ''), (['--read-data'], ''),):
            for mode in ('--fsck', '--fsck-prune'):
                with self.subTest(mode, args=args):
                    result = self.host.good(mode, *args)
                    self.assertEqual(result.err, '')
                    out = re.sub(r'  Chunk \d+/\d+\.\.\.\n', '', result.out)
                    self.assertRegex(out, '^' + PROGRESS % lines + '$')

    def test_gui_progress(self):
        """6.3"""
        out = self.host.good('--fsck').out
        self.assertEqual(re.findall(r'Archive (\d+)/(\d+)...', out),
                         [('1', '3'), ('2', '3'), ('3', '3')])
        self.assertEqual(re.findall(r'(?m)^Phase (\d)', out), list('12345'))

    def test_each_line_is_flushed(self):
        """3.10: programs show it as progress"""
        events = []

        class Stream:
            def write(self, text):
                events.append(text)

            def flush(self):
                events.append('flush')

        with mock.patch('sys.stdout', Stream()):
            tarsnap.phase('Phase 1: x')
        self.assertEqual(events, ['Phase 1: x\n', 'flush'])

    def test_whole_store_is_left_alone(self):
        head = self.host.seq()
        self.host.good('--fsck-prune', '--read-data')
        self.assertEqual(self.host.seq(), head)

    def test_cache_directory_of_any_name(self):
        odd = self.lab.host(os.fsdecode(b"odd ?' \xff"), key=self.lab.key)
        odd.good('--fsck')
        self.assertEqual(dump(odd), dump(self.host))

    def test_empty_machine(self):
        host = lab.Lab(self).host()
        self.assertRegex(host.good('--fsck').out, '^' + PROGRESS % '' + '$')

    def test_roles(self):
        for roles, mode, what in (
                ((lab.R,), '--fsck', 'write'),
                ((lab.R, lab.W), '--fsck-prune', 'delete'),
                ((lab.D,), '--fsck-prune', 'read'),
                ((lab.N,), '--fsck', 'write')):
            host = self.lab.host('roles%s' % roles[-1], roles)
            with self.subTest(mode, roles=roles):
                result = host.run(mode)
                self.assertEqual(result.status, 1)
                self.assertIn(what + ' authorization', result.err)
                self.assertIn(REFUSED, result.err)
        for roles in ((lab.W,), (lab.D,), (lab.R, lab.W), (lab.R, lab.D)):
            host = self.lab.host('fine%d%d' % (len(roles), sum(roles)),
                                 roles)
            host.good('--fsck')
        host = self.lab.host('data', (lab.D,))
        self.assertIn('read authorization', host.run(
            '--fsck', '--read-data').err)


class Damage(FsckCase):

    def test_chunk_of_the_middle_archive(self):
        self.damage(self.chunk('two'))
        self.host.good('--fsck')            # the index is whole
        self.assertEqual(self.refused('--read-data'), ['middle'])
        self.host.good('--print-stats')
        self.pruned('--read-data', lost=['middle'])

    def test_chunk_of_the_first_archive(self):
        self.damage(self.chunk('one'))
        self.assertEqual(self.refused('--read-data'), ['first'])
        self.pruned('--read-data', lost=['first'])

    def test_shared_chunk(self):
        self.damage(self.chunk('both'))
        self.assertEqual(sorted(self.refused('--read-data')),
                         ['first', 'middle'])
        self.pruned('--read-data', lost=['first', 'middle'])

    def test_first_and_middle(self):
        self.damage(self.chunk('one'), self.kids(self.record('middle'))[0])
        self.assertEqual(sorted(self.refused('--read-data')),
                         ['first', 'middle'])
        self.pruned('--read-data', lost=['first', 'middle'])

    def test_page(self):
        for name in ('first', 'middle'):
            with self.subTest(name):
                self.damage(self.kids(self.record(name))[0])
                self.assertEqual(self.refused(), [name])
                self.pruned(lost=[name])

    def test_record(self):
        """Its name is lost with it."""
        archive = tarsnap.Names(self.lab.key).archive(b'middle').hex()
        self.damage(self.record('middle'))
        result = self.host.run('--fsck')
        self.assertIn('Archive with the id %s is damaged' % archive,
                      result.err)
        result = self.host.good('--fsck-prune')
        self.assertIn('  Deleted archive with the id %s\n' % archive,
                      result.out)
        self.sound(['first', 'last'])

    def test_everything(self):
        self.damage(*(self.record(name) for name in self.models))
        self.host.good('--fsck-prune')
        self.sound([])

    def test_segment_lost_or_cut_short(self):
        """With it goes the list of what was put: it must be given back."""
        path, offset, length = self.place(self.chunk('two'))
        os.rename(path, path + '.away')
        for present in (False, True):
            if present:
                shutil.copy(path + '.away', path)
                os.chmod(path, 0o600)
                os.truncate(path, offset + length // 2)
            for mode in ('--fsck', '--fsck-prune'):
                with self.subTest(mode, present=present):
                    result = self.host.run(mode)
                    self.assertEqual(result.status, 1)
                    self.assertRegex(result.err, 'lists of commit 2 are lost')
                    self.assertIn(REFUSED, result.err)
        result = self.host.run('-c', '-f', 'x', '-C', self.lab.tree, '.')
        self.assertIn('Run --fsck', result.err)         # not upon that
        self.host.check('first', self.models['first'])
        os.rename(path + '.away', path)
        self.host.good('--fsck')
        self.sound(list(self.models))

    def test_what_was_there_stays_until_then(self):
        """--fsck that ends early leaves the cache directory as it was."""
        before = dump(self.host), sorted(os.listdir(self.host.cache))
        with mock.patch.object(tarsnap.Fsck, 'decide', side_effect=
                               tarsnap.RemoteError('Connection lost')):
            self.assertEqual(self.host.run('--fsck').status, 1)
        self.assertEqual((dump(self.host), sorted(os.listdir(
            self.host.cache))), before)
        self.sound(list(self.models))

    def test_what_no_archive_needs(self):
        """Blocks from before that nothing refers to: no error, but pruned."""
        page = self.kids(self.record('middle'))[0]
        with self.without_kids(page):
            self.host.good('-d', '-f', 'middle')
        self.models.pop('middle')
        self.assertNotEqual(Audit(self.lab).reachable(),
                            set(Audit(self.lab).live))
        result = self.host.good('--fsck')
        self.assertEqual(result.err, '')
        self.pruned(lost=[])

    def without_kids(self, page):
        """Deleting leaves what is below `page`, and the page."""
        real = tarsnap.release

        def release(cache, records):
            below = {page} | set(self.kids(page))
            dead, plain, stored = real(cache, records)
            return [name for name in dead if name not in below], plain, stored
        return mock.patch.object(tarsnap, 'release', release)

    def test_damage_that_no_archive_needs(self):
        """A new archive might build on it."""
        page = self.kids(self.record('middle'))[0]
        with self.without_kids(page):
            self.host.good('-d', '-f', 'middle')
        self.models.pop('middle')
        self.damage(page)
        self.assertEqual(self.refused(), [])
        self.pruned(lost=[])
        self.again('middle')

    def test_a_server_that_cannot_read_is_not_damage(self):
        real = tarsnapd.FileStore.get

        def get(store, key, offset=0, length=None):
            if offset:
                raise tarsnapd.StoreError('read', key, 'Input/output error')
            return real(store, key, offset, length)
        for mode in ('--fsck', '--fsck-prune'):
            with mock.patch.object(tarsnapd.FileStore, 'get', get):
                result = self.host.run(mode)
            self.assertEqual(result.status, 1)
            self.assertIn('Input/output error', result.err)
            self.assertIn(REFUSED, result.err)
            self.assertNotIn('Deleted', result.out)
        self.host.good('--fsck')
        self.sound(list(self.models))

    def test_a_bug_here_is_not_damage(self):
        with mock.patch.object(tarsnap, 'index_unpack',
                               side_effect=MemoryError('no memory')):
            result = self.host.run('--fsck-prune')
        self.assertEqual(result.status, 1)
        self.assertNotIn('Deleted', result.out)
        self.host.good('--fsck')
        self.sound(list(self.models))

    def test_damage_on_the_way_only(self):
        """What is whole at the second look is whole."""
        real, seen = tarsnap.Opener.open, set()

        def opened(opener, cls, name, block, refs_only=False):
            if name not in seen:
                seen.add(name)
                raise tarsnap.CorruptError('flipped on the way')
            return real(opener, cls, name, block, refs_only)
        head = self.host.seq()
        with mock.patch.object(tarsnap.Opener, 'open', opened):
            self.host.good('--fsck-prune', '--read-data')
        self.assertEqual(self.host.seq(), head)

    def test_another_host_meanwhile(self):
        """Who deletes or creates first wins, and all is looked at again."""
        self.damage(self.chunk('two'))
        other = self.lab.host('other')
        shutil.copytree(self.host.cache, other.cache, symlinks=True)
        real, times = tarsnap.Fsck.prune, []

        def prune(fsck, doomed):
            if not times:
                other.create('new')
            times.append(len(doomed))
            return real(fsck, doomed)
        self.models['new'] = snapshot(self.lab.tree)
        with mock.patch.object(tarsnap.Fsck, 'prune', prune):
            self.pruned('--read-data', lost=['middle'])
        self.assertEqual(times, [1, 1])

    def test_commit_that_is_not_heard(self):
        """The connection goes while the deletion is committed."""
        self.damage(self.chunk('two'))
        real, lost = tarsnap.transaction_commit, []

        def commit(channel, raw):
            body = real(channel, raw)
            if not lost:
                lost.append(1)
                raise tarsnap.ChannelLost('Connection lost')
            return body
        with mock.patch.object(tarsnap, 'transaction_commit', commit):
            self.pruned('--read-data', lost=['middle'])


class Mended(FsckCase):
    """What --fsck found damaged is put again by whoever meets it."""

    def backup(self, name):
        self.tree(name)
        self.models['new'] = snapshot(self.lab.tree)
        with lab.tapped() as log:
            self.host.create('new')
        return [row[0] for row in log.puts()]

    def test_a_backup_of_the_same_makes_archives_whole(self):
        for what, name, victim in (
                ('chunk', 'middle', self.chunk('two')),
                ('shared', 'last', self.chunk('more')),
                ('page', 'first', self.kids(self.record('first'))[0])):
            with self.subTest(what):
                self.damage(victim)
                found = self.refused('--read-data')
                self.assertIn(name, found)
                self.assertIn(victim, self.backup(name))
                self.host.good('--fsck', '--read-data')
                self.sound(list(self.models))
                self.host.good('-d', '-f', 'new')
                self.models.pop('new')
                self.sound(list(self.models))

    def test_the_index_made_anew_knows_the_new_copy(self):
        self.damage(self.chunk('two'))
        self.refused('--read-data')
        self.backup('middle')
        before = self.place(self.chunk('two'))
        status, _, said = operator('rebuild', self.lab.store)
        self.assertEqual((status, said), (0, ''))
        self.assertEqual(self.place(self.chunk('two')), before)
        self.sound(list(self.models))

    def test_what_is_not_met_stays_damaged(self):
        self.damage(self.chunk('two'))
        self.refused('--read-data')
        self.assertNotIn(self.chunk('two'), self.backup('first'))
        self.host.check('new', self.models['new'])
        self.assertEqual(self.refused('--read-data'), ['middle'])
        self.pruned('--read-data', lost=['middle'])

    def test_a_whole_copy_is_not_replaced(self):
        """A write key cannot put another block under the name of a good one:
        what this client holds damaged the server finds whole.
        """
        with self.host.database() as db:
            db.execute('INSERT INTO rotten VALUES(?)', (self.chunk('two'),))
            db.commit()
        self.tree('middle')
        result = self.host.run('-c', '-f', 'new', '-C', self.lab.tree, '.')
        self.assertEqual(result.status, 1)
        self.assertIn('Run --fsck', result.err)
        before = self.place(self.chunk('two'))
        remote = tarsnap.Remote(self.lab.key, (lab.W, lab.R))
        try:
            self.assertEqual(tarsnap.blocks_look(
                remote.connect(), [self.chunk('two')]), {})
        finally:
            remote.close()
        self.host.good('--fsck')
        self.backup('middle')
        self.assertEqual(self.place(self.chunk('two')), before)

    def test_the_connection_breaks_meanwhile(self):
        self.damage(self.chunk('two'))
        self.refused('--read-data')
        real, lost = tarsnap.Transaction.enqueue, []

        def enqueue(txn, kind, body):
            real(txn, kind, body)
            if not lost:
                lost.append(1)
                txn.remote.close()
                raise tarsnap.ChannelLost('Connection lost')
        with mock.patch.object(tarsnap.Transaction, 'enqueue', enqueue):
            self.backup('middle')
        self.assertEqual(lost, [1])
        self.sound(list(self.models))


class Parts(LabTest):

    def test_checkpoint_of_a_dead_run(self):
        """5.1: --fsck, too, makes it a .part that nobody takes for open."""
        for number in range(4):
            self.write('f%d' % number, noise(str(number)))
        real = tarsnap.Create.checkpoint

        def dies(run, writer, series):
            real(run, writer, series)
            os._exit(7)
        patch = mock.patch.multiple(tarsnap.Create, checkpoint=dies,
                                    due=lambda run: True)
        self.assertEqual(self.lab.crash(
            self.host, patch, '-c', '-f', 'cut', '--checkpoint-bytes=1000000',
            '-C', self.lab.tree, '.'), 7)
        self.assertEqual(self.states(), [tarsnap.OPEN])
        self.host.good('--fsck')
        self.assertEqual(self.states(), [tarsnap.PARTIAL])

    def states(self):
        audit = Audit(self.lab)
        return list(audit.linked.values())


if __name__ == '__main__':
    unittest.main()
