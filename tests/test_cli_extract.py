# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Options of -x, the lines of -x -v, and how others call it."""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
import threading
import time
import unittest
import unittest.mock

import readlab
import tarsnap

ROOT = os.geteuid() == 0
OLD = readlab.OLD * 10 ** 9
END = b'tarsnap: Error exit delayed from previous errors.\n'
NOBODY = 65534


def setUpModule():
    global LAB, HOST, PROGRAM
    LAB, HOST = readlab.shared('a')
    PROGRAM = readlab.Program(HOST)


class Case(unittest.TestCase):

    def setUp(self):
        self.target = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.target, True)

    def extract(self, *args, run=None, **options):
        """(status, stdout, stderr) of -x into the target."""
        return (run or PROGRAM.run)('-x', '-f', 'a', '-C', self.target, *args,
                                    **options)

    def good(self, *args, **options):
        self.assertEqual(self.extract(*args, **options), (0, b'', b''))

    def path(self, *names):
        return os.path.join(self.target, *names)

    def stat(self, *names):
        return os.lstat(self.path(*names))

    def mode(self, *names):
        return stat.S_IMODE(self.stat(*names).st_mode)

    def read(self, *names):
        with open(self.path(*names), 'rb') as file:
            return file.read()

    def write(self, name, data=b'mine', seconds=None):
        path = os.fsencode(self.path(name))
        readlab.file_make(path, data, 0o644)
        if seconds is not None:
            readlab.times_set(path, seconds)

    def names(self):
        return sorted(os.listdir(self.target))


class VerboseLines(Case):
    """CLI contract 3.5 and 3.6 for -x."""

    def test_v(self):
        self.assertEqual(self.extract('-v', 'docs', 'soft', 'names'), (
            0, b'', b'x ./docs/\nx ./docs/a\nx ./docs/b\nx ./docs/deep/\n'
            b'x ./docs/deep/c\nx ./docs/hard\nx ./names/\n'
            b'x ./names/bad\\377\nx ./names/caf\xc3\xa9\n'
            b'x ./names/new\\nline\nx ./names/tab\\tback\\\\slash\n'
            b'x ./soft\n'))

    def test_vv_has_the_long_lines_of_tv(self):
        listed = PROGRAM.run('-tv', '-f', 'a')[1]
        status, out, err = self.extract('-vv')
        self.assertEqual((status, out), (0, b''))
        self.assertEqual(err.splitlines(),
                         [b'x ' + line for line in listed.splitlines()])

    def test_null_output(self):
        self.assertEqual(
            self.extract('-v', '--null-output', 'names')[2],
            b'x\0\0./names/\0x\0\0./names/bad\xff\0x\0\0./names/caf\xc3\xa9'
            b'\0x\0\0./names/new\nline\0x\0\0./names/tab\tback\\slash\0')
        status, _, err = self.extract('-v', '--null-output', '-k',
                                      'names/bad\udcff')
        self.assertEqual((status, err),
                         (1, b'x\0\0./names/bad\xff\0\0File exists\0' + END))
        err = self.extract('-vv', '--null-output', '--iso-dates', 'soft')[2]
        self.assertEqual(len(err.split(b'\0\0')), 8)

    def test_a_failure_is_appended_to_the_line(self):
        self.write('docs/a')
        self.assertEqual(self.extract('-kv', 'docs/a', 'soft'), (
            1, b'', b'x ./docs/a: File exists\nx ./soft\n' + END))

    def test_a_failure_without_v_has_no_prefix(self):
        self.write('docs/a')
        self.assertEqual(self.extract('-k', 'docs/a', 'soft'), (
            1, b'', b'./docs/a: File exists\n' + END))

    def test_unmatched_operands(self):
        self.assertEqual(self.extract('soft', 'none', 'names/*x'), (
            1, b'', b'tarsnap: none: Not found in archive\n'
            b'tarsnap: names/*x: Not found in archive\n' + END))
        self.assertEqual(self.names(), ['soft'])

    def test_json(self):
        self.write('docs/b', b'x' * 26628, readlab.OLD)
        self.write('docs/a')
        status, out, err = self.extract('--json', '-v', '-k', '--resume-ext',
                                        'docs/*', 'empty')
        self.assertEqual(status, 1)
        *found, last = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(
            [(row['type'], row['path'], row['status']) for row in found],
            [('entry', './docs/b', 'skipped'),
             ('entry', './docs/deep', 'extracted'),
             ('entry', './docs/deep/c', 'extracted'),
             ('entry', './docs/hard', 'extracted'),
             ('entry', './empty', 'extracted')])
        self.assertEqual(last, {'type': 'summary', 'extracted': 4,
                                'skipped': 1, 'bytes': 12, 'errors': 1})
        self.assertEqual([json.loads(line) for line in err.splitlines()], [
            {'type': 'error', 'path': './docs/a', 'message': 'File exists'},
            {'type': 'message', 'message': 'Error exit delayed from previous '
             'errors.'}])

    def test_json_without_v_is_the_summary(self):
        status, out, err = self.extract('--json')
        self.assertEqual((status, err), (0, b''))
        self.assertEqual(json.loads(out)['errors'], 0)

    def test_json_and_O_exclude_each_other(self):
        self.assertEqual(self.extract('--json', '-O')[:2], (1, b''))


class Options(Case):
    """CLI contract 1.3 and 5.7 for -x."""

    def test_O(self):
        self.assertEqual(self.extract('-O', 'docs/a', 'docs/deep', 'soft'),
                         (0, b'alpha\ngamma\n', b''))
        self.assertEqual(self.names(), [])
        self.assertEqual(self.extract('-Ov', 'docs/a'),
                         (0, b'alpha\n', b'x ./docs/a\n'))

    def test_q(self):
        self.good('-q', 'docs/[ab]')
        self.assertEqual(os.listdir(self.path('docs')), ['a'])

    def test_k_keeps_what_is_there(self):
        self.write('docs/a', b'mine', 5)
        os.chmod(self.path('docs'), 0o700)
        self.assertEqual(self.extract('-k')[::2],
                         (1, b'./docs/a: File exists\n' + END))
        self.assertEqual(self.read('docs/a'), b'mine')
        self.assertEqual(self.mode('docs'), 0o700)
        self.assertEqual(self.read('docs/hard'), b'alpha\n')
        self.assertEqual(self.mode('docs/deep'), 0o755)

    def test_keep_newer_files(self):
        for seconds, kept in ((readlab.OLD + 1, True), (readlab.OLD, True),
                              (readlab.OLD - 1, False)):
            with self.subTest(seconds=seconds):
                self.write('empty', b'mine', seconds)
                self.good('--keep-newer-files', 'empty')
                self.assertEqual(self.read('empty'),
                                 b'mine' if kept else b'')

    def test_resume_extract(self):
        for data, seconds, kept in (
                (b'Alpha\n', readlab.OLD, True), (b'A', readlab.OLD, False),
                (b'Alpha\n', readlab.OLD + 1, False)):
            with self.subTest(data=data, seconds=seconds):
                self.write('docs/a', data, seconds)
                self.good('--resume-extract', 'docs/a')
                self.assertEqual(self.read('docs/a'),
                                 data if kept else b'alpha\n')
        # Whole seconds only: another fraction is no other time.
        self.write('docs/a', b'Alpha\n')
        os.utime(self.path('docs/a'), ns=(OLD + 5, OLD + 5))
        self.good('--resume-extract', 'docs/a')
        self.assertEqual(self.read('docs/a'), b'Alpha\n')

    def test_existing_links_are_broken_not_written_through(self):
        for flag in ((), ('-U',)):
            with self.subTest(flag):
                self.write('other')
                os.makedirs(self.path('docs'), exist_ok=True)
                if os.path.exists(self.path('docs/a')):
                    os.unlink(self.path('docs/a'))
                os.link(self.path('other'), self.path('docs/a'))
                self.good(*flag, 'docs/a')
                self.assertEqual(self.read('other'), b'mine')
                self.assertEqual(self.read('docs/a'), b'alpha\n')

    def test_U_replaces_a_symlink_that_stands_for_a_directory(self):
        os.mkdir(self.path('away'))
        os.symlink('away', self.path('docs'))
        status, _, err = self.extract('docs/a')
        self.assertEqual(status, 1)
        self.assertIn(b'./docs/a: Cannot extract through symlink docs', err)
        self.good('-U', 'docs/a')
        self.assertEqual(os.listdir(self.path('away')), [])
        self.assertEqual(self.read('docs/a'), b'alpha\n')

    def test_S_makes_zeros_holes(self):
        lab, host = readlab.shared()
        readlab.file_make(os.fsencode(lab.path('tree', 'z')),
                          bytes(2 ** 20) + b'end', 0o644)
        host.create('a', 'z')
        program = readlab.Program(host)
        blocks = {}
        for flags in (), ('-S',):
            self.good(*flags, run=program.run)
            self.assertEqual(self.read('z'), bytes(2 ** 20) + b'end')
            blocks[flags] = self.stat('z').st_blocks
        self.assertLess(blocks[('-S',)] * 512, 2 ** 18)
        self.assertGreaterEqual(blocks[()] * 512, 2 ** 20)

    def test_m(self):
        before = time.time() - 2
        self.good('-m', 'docs')
        for name in 'docs', 'docs/a', 'docs/deep':
            self.assertGreater(self.stat(name).st_mtime, before, name)
        self.good('docs')
        for name in 'docs', 'docs/a', 'docs/deep':
            self.assertEqual(self.stat(name).st_mtime_ns, OLD, name)

    def test_strip_components(self):
        self.good('--strip-components', '2', 'docs', 'soft')
        self.assertEqual(self.names(), ['a', 'b', 'deep', 'hard'])
        self.assertEqual(self.stat('a').st_ino, self.stat('hard').st_ino)
        for wrong in '-1', 'x':
            self.assertEqual(self.extract('--strip-components', wrong)[0], 1)

    def test_C_may_be_given_several_times(self):
        os.makedirs(self.path('one', 'two'))
        self.good('-C', 'one', '-C', 'two', 'soft')
        self.assertEqual(os.listdir(self.path('one', 'two')), ['soft'])
        status, _, err = self.extract('-C', 'none')
        self.assertEqual(status, 1)
        self.assertTrue(err.startswith(
            b'tarsnap: Cannot change to directory none: '), err)

    def test_leading_slashes(self):
        lab, host = readlab.shared()
        top = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, top, True)
        readlab.file_make(os.fsencode(os.path.join(top, 'f')), b'f', 0o644)
        host.good('-c', '-P', '-f', 'a', os.path.join(top, 'f'))
        shutil.rmtree(top)
        program = readlab.Program(host)
        status, out, err = self.extract(run=program.run)
        self.assertEqual((status, err), (
            0, b"tarsnap: Removing leading '/' from member names\n"))
        self.assertEqual(self.read(top.lstrip('/'), 'f'), b'f')
        self.good('--quiet', run=program.run)
        self.assertFalse(os.path.exists(top))
        self.good('-P', run=program.run)
        self.assertTrue(os.path.exists(os.path.join(top, 'f')))

    def test_a_checkpoint_is_extracted_and_reported(self):
        lab, host = readlab.shared()
        with killed_after_a_checkpoint():
            host.run('-c', '-f', 'a', '-C', lab.tree, '.')
        host.good('--recover')
        status, _, err = self.extract(
            run=lambda *args: readlab.Program(host).run(
                *['a.part' if word == 'a' else word for word in args]))
        self.assertEqual(status, 1)
        self.assertTrue(err.startswith(b'tarsnap: Truncated input file\n'),
                        err)
        self.assertTrue(err.endswith(END))
        self.assertEqual(self.read('docs/a'), b'alpha\n')


@contextlib.contextmanager
def killed_after_a_checkpoint():
    """What is created meanwhile ends where it would be whole."""
    real = tarsnap.Transaction.commit

    def commit(txn, make, state, *args):
        if state == tarsnap.COMPLETE:
            raise tarsnap.UserError('killed')
        return real(txn, make, state, *args)

    with unittest.mock.patch.object(tarsnap.Transaction, 'commit', commit), \
            unittest.mock.patch.object(tarsnap.Create, 'due',
                                       lambda create: True):
        yield


class Permissions(Case):
    """-p, -o, --same-owner and their opposites; the last one counts."""

    def modes(self, *args, **options):
        """(mode of ./set, of ./sticky, of ./pipe) after extraction."""
        umask = os.umask(0o027)
        try:
            self.good(*args, 'set', 'sticky', 'pipe', **options)
        finally:
            os.umask(umask)
        return [oct(self.mode(name)) for name in ('set', 'sticky', 'pipe')]

    @unittest.skipUnless(ROOT, 'not root')
    def test_root_restores_all(self):
        self.assertEqual(self.modes(), ['0o4755', '0o1777', '0o622'])

    def test_p(self):
        exact, masked = (['0o4755', '0o1777', '0o622'],
                         ['0o750', '0o750', '0o600'])
        for flags, wanted in (
                (['-p'], exact), (['--no-same-permissions'], masked),
                (['--no-same-permissions', '-p'], exact),
                (['--same-permissions', '--no-same-permissions'], masked)):
            with self.subTest(flags):
                self.assertEqual(self.modes(*flags), wanted)

    @unittest.skipUnless(ROOT, 'not root')
    def test_owner(self):
        lab, host = readlab.shared()
        readlab.file_make(os.fsencode(lab.path('tree', 'f')), b'', 0o4755)
        os.chown(lab.path('tree', 'f'), 4711, 4712)
        os.chmod(lab.path('tree', 'f'), 0o4755)
        os.lchown(lab.path('tree', 'soft'), 4711, 4712)
        host.create('a', 'f', 'soft')
        run = readlab.Program(host).run
        for flags, kept in (
                ([], True), (['-o'], False), (['--no-same-owner'], False),
                (['-o', '--same-owner'], True),
                (['--same-owner', '-o'], False), (['-po'], False)):
            with self.subTest(flags):
                self.good(*flags, run=run)
                for name in 'f', 'soft':
                    st = self.stat(name)
                    self.assertEqual((st.st_uid, st.st_gid), (4711, 4712)
                                     if kept else (0, 0))
                self.assertEqual(self.mode('f'), 0o4755 if kept else 0o755)

    @unittest.skipUnless(ROOT, 'not root')
    def test_numeric_owner(self):
        lab, host = readlab.shared()
        path = lab.path('tree', 'f')
        readlab.file_make(os.fsencode(path), b'', 0o644)
        os.chown(path, NOBODY, 0)
        entry = tarsnap.Entry()
        entry.uname, entry.uid = b'root', NOBODY
        entry.gname, entry.gid = b'no such group', 4712
        for numeric, wanted in ((False, (0, 4712)), (True, (NOBODY, 4712))):
            owners = tarsnap.Owners(numeric)
            self.assertEqual((owners.uid(entry), owners.gid(entry)), wanted)
        host.create('a', 'f')
        self.good('--numeric-owner', run=readlab.Program(host).run)
        self.assertEqual(self.stat('f').st_uid, NOBODY)

    @unittest.skipUnless(ROOT, 'not root')
    def test_an_owner_refused_is_said_and_the_rest_is_done(self):
        lab, host = readlab.shared()
        os.chown(lab.path('tree', 'set'), 4711, 4712)
        os.chmod(lab.path('tree', 'set'), 0o4755)
        host.create('a', 'set')
        refused = unittest.mock.Mock(side_effect=PermissionError(
            1, 'Operation not permitted'))
        with unittest.mock.patch.object(os, 'chown', refused):
            self.assertEqual(
                self.extract('-p', '--same-owner',
                             run=readlab.Program(host).run),
                (1, b'', b'set: Cannot set owner 4711:4712: Operation not '
                 b'permitted\n' + END))
        self.assertEqual(self.stat('set').st_mtime_ns, OLD)
        self.assertEqual(self.mode('set'), 0o755)

    @unittest.skipUnless(ROOT, 'not root')
    def test_chroot(self):
        os.makedirs(self.path('docs'))
        os.symlink('/docs', self.path('names'))
        status, out, err = self.extract('-P', '--chroot', '--same-owner',
                                        run=PROGRAM.real)
        self.assertEqual((status, err), (0, b''))
        # Absolute for the program is below the target.
        self.assertIn('a', os.listdir(self.path('docs')))
        self.assertEqual(self.mode('pipe'), 0o622)

    @unittest.skipUnless(ROOT, 'not root')
    def test_devices_keep_their_bits(self):
        lab, host = readlab.shared()
        path = lab.path('tree', 'null')
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError as e:
            self.skipTest('no devices here: %s' % e)
        os.chmod(path, 0o3666)
        os.chmod(lab.path('tree', 'pipe'), 0o6711)
        host.create('a', 'null', 'pipe')
        self.good(run=readlab.Program(host).run)
        self.assertEqual([self.mode('null'), self.mode('pipe')],
                         [0o3666, 0o6711])


class Wrappers(Case):
    """CLI contract 6.3 to 6.5, 6.11: commands as they are called."""

    def test_redsnapper(self):
        lab, host = readlab.shared()
        names = ['w/%d%s' % (number, mark) for number, mark in enumerate(
            ['*', '?', '[x', ']', '{', '}', ' ', "'", '$(x)', '-'])]
        for name in names:
            readlab.file_make(os.fsencode(lab.path('tree', name)),
                              name.encode(), 0o644)
        host.create('a', 'w')
        program = readlab.Program(host)
        self.write(names[3], b'mine', int(time.time()))
        found = []

        def one(name):
            word = ''.join('\\' + char if char in '*?[]{}' else char
                           for char in name)
            found.append(program.real('-xvf', 'a', '-C', self.target,
                                      '--keep-newer-files', '-k', word))

        threads = [threading.Thread(target=one, args=(name,))
                   for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = b''.join(err for _, _, err in found).splitlines()
        self.assertEqual(sorted(lines), sorted(
            [b'x %b' % name.encode() for name in names
             if name != names[3]]
            + [b'x %b: File exists' % names[3].encode(), END.rstrip()]))
        for name in names:
            self.assertEqual(self.read(name), b'mine' if name == names[3]
                             else name.encode())

    def test_snapback(self):
        status, out, err = PROGRAM.run(
            '--quiet', '--no-print-stats', '-x', '-f', 'a', '-C',
            self.target, '-p', '-o', '--fast-read', '--resume-extract',
            '--exclude', 'deep', '--', './docs', './soft')
        self.assertEqual((status, out, err), (0, b'', b''))
        self.assertEqual(sorted(os.listdir(self.path('docs'))),
                         ['a', 'b', 'hard'])

    def test_gui_restore(self):
        self.assertEqual(PROGRAM.run(
            '-x', '-P', '-C', self.target, '-k', '--keep-newer-files', '-p',
            '-f', 'a', 'docs')[0], 0)
        self.assertEqual(self.read('docs/deep/c'), b'gamma\n')

    def test_gui_restores_a_list_from_standard_input(self):
        done = subprocess.run(
            PROGRAM.argv('-x', '-C', self.target, '-T', '-', '-f', 'a'),
            input=b'docs/deep\n./soft\nnames/bad\xff', check=False,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (0, b'', b''))
        self.assertEqual(self.names(), ['docs', 'names', 'soft'])
        self.assertEqual(os.listdir(os.fsencode(self.path('names'))),
                         [b'bad\xff'])

    def test_nixos(self):
        self.assertEqual(PROGRAM.run('-x', '-f', 'a', '-v', '-C',
                                     self.target)[:2], (0, b''))

    def test_r_is_a_tar_stream_with_acls(self):
        if not (shutil.which('setfacl') and shutil.which('tar')):
            self.skipTest('no setfacl or no tar')
        lab, host = readlab.shared()
        made = subprocess.run(
            ['setfacl', '-m', 'u:4711:rwx,g:4712:r', lab.path('tree/docs/a')],
            check=False, stderr=subprocess.DEVNULL)
        if made.returncode:
            self.skipTest('the file system has no ACLs')
        subprocess.run(['setfacl', '-d', '-m', 'u:4711:rx',
                        lab.path('tree/docs')], check=True)
        host.create('a', 'docs')
        tar = self.path('a.tar')
        with open(tar, 'wb') as file:
            file.write(readlab.Program(host).run('-r', '-f', 'a')[1])
        subprocess.run(['tar', '--acls', '-xpf', tar, '-C', self.target],
                       check=True)
        for name in 'docs', 'docs/a':
            self.assertEqual(acl(self.path(name)), acl(lab.path('tree',
                                                                name)))


def acl(path):
    """An ACL as getfacl(1) shows it, without the name of the file."""
    return subprocess.run(['getfacl', '-n', '-c', '-p', path], check=True,
                          stdout=subprocess.PIPE).stdout


if __name__ == '__main__':
    unittest.main()
