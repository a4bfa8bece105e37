# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What --list-archives and -t print, to the byte, and as the programs that
parse it take it apart."""

import datetime
import os
import pty
import re
import subprocess
import time
import unittest

import readlab
import tarsnap

FIRST, SECOND = 'box-2019-08-26', 'name with blanks: two'
HASH = '[0-9a-f]{64}'


def setUpModule():
    global LAB, HOST, PROGRAM
    LAB, HOST = readlab.shared(FIRST, SECOND)
    PROGRAM = readlab.Program(HOST)


class Case(unittest.TestCase):

    def out(self, *args, run=None, **options):
        """stdout of a run that says nothing on stderr."""
        status, out, err = (run or PROGRAM.run)(*args, **options)
        self.assertEqual((status, err), (0, b''), args)
        return out


class ListArchives(Case):
    """CLI contract 3.3."""

    def words(self, name):
        """The command line that made archive `name`, as stored."""
        return [b'tarsnap', b'--no-default-config', b'--keyfile',
                os.fsencode(HOST.keyfile), b'--cachedir',
                os.fsencode(HOST.cache), b'-c', b'-f', name,
                b'--creationtime=%d' % (readlab.OLD + (name == b'%b' %
                                        SECOND.encode())),
                b'-C', os.fsencode(LAB.tree), b'.']

    def test_none_prints_names_in_the_order_of_their_making(self):
        self.assertEqual(self.out('--list-archives'),
                         ('%s\n%s\n' % (FIRST, SECOND)).encode())

    def test_v_adds_one_tab_and_the_time(self):
        self.assertEqual(
            self.out('--list-archives', '-v'),
            ('%s\t2019-08-26 18:30:46\n%s\t2019-08-26 18:30:47\n'
             % (FIRST, SECOND)).encode())

    def test_TZ_is_heeded(self):
        for zone, text in (('XYZ-3', b'21:30:46'), ('0', b'18:30:46')):
            self.assertIn(text, self.out('-v', '--list-archives', zone=zone))

    def test_vv_adds_the_command_line(self):
        lines = self.out('--list-archives', '-vv').split(b'\n')
        self.assertEqual(lines[0], b'\t'.join((
            FIRST.encode(), b'2019-08-26 18:30:46',
            b' '.join(self.words(FIRST.encode())))))

    def test_hashes(self):
        names = tarsnap.Names(HOST.key)
        ids = [names.archive(name.encode()).hex() for name in (FIRST,
                                                               SECOND)]
        self.assertEqual(self.out('--list-archives', '--hashes'),
                         ('%s\n%s\n' % tuple(ids)).encode())
        self.assertEqual(
            self.out('--list-archives', '--hashes', '-v').split(b'\n')[0],
            ('%s\t%s\t2019-08-26 18:30:46' % (ids[0], FIRST)).encode())
        self.assertEqual(
            self.out('--list-archives', '--hashes', '-vv').split(b'\n')[0],
            ('%s\t%s\t2019-08-26 18:30:46\t' % (ids[0], FIRST)).encode()
            + b' '.join(self.words(FIRST.encode())))
        self.assertEqual(
            self.out('--list-archives', '--hashes', '-f', ids[1]),
            ids[1].encode() + b'\n')
        self.assertEqual(
            self.out('--list-archives', '--hashes', '-v', '-f', ids[1],
                     '-f', ids[1].upper()),
            ('%s\t%s\t2019-08-26 18:30:47\n' % (ids[1], SECOND)).encode())

    def test_hashes_of_none(self):
        status, out, err = PROGRAM.run('--list-archives', '--hashes', '-f',
                                       'ab' * 32, '-f', FIRST)
        self.assertEqual((status, out), (1, b''))
        self.assertEqual(err, (
            'tarsnap: Archive does not exist: %s\ntarsnap: %s: Not the hash '
            'of a name: 64 hexadecimal digits, as --hashes prints them\n'
            'tarsnap: Error exit delayed from previous errors.\n'
            % ('ab' * 32, FIRST)).encode())

    def test_a_name_without_hashes_is_refused(self):
        status, out, err = PROGRAM.run('--list-archives', '-f', FIRST)
        self.assertEqual((status, out), (1, b''))
        self.assertIn(b'--hashes', err)

    def test_null_output(self):
        self.assertEqual(
            self.out('--list-archives', '--null-output'),
            ('%s\0%s\0' % (FIRST, SECOND)).encode())
        record = self.out('--list-archives', '--null-output', '-vv')
        self.assertTrue(record.startswith(
            ('%s\0\x002019-08-26 18:30:46\0\0' % FIRST).encode()
            + b'\0\0\0'.join(self.words(FIRST.encode())) + b'\0'
            + SECOND.encode() + b'\0\0'), record)

    def test_no_archives(self):
        lab, host = readlab.shared()
        program = readlab.Program(host)
        self.assertEqual(program.run('--list-archives', '-vv'), (0, b'', b''))

    def test_the_parsers_of_others(self):
        one = self.out('--list-archives', '-vv').decode().splitlines()
        for line in one:
            gui = re.fullmatch(r'(.+)\t+(\S+\s+\S+)\t+(.+)', line)
            self.assertIn(gui[1], (FIRST, SECOND))
            self.assertNotIn(' -P ', gui[3])
        for line in self.out('--list-archives', '-v').decode().splitlines():
            self.assertEqual(line.count('\t'), 1)       # tarsnap-old-archives
            name, date = line.split('\t')               # snapback, c4rlo
            datetime.datetime.strptime(date, '%Y-%m-%d %H:%M:%S')
            self.assertEqual(line[:line.rindex('\t')], name)    # tarsnapper

    def test_on_a_terminal_only_names_and_no_controls(self):
        lab, host = readlab.shared('bell\a')
        name, slave = pty.openpty()
        with subprocess.Popen(
                readlab.Program(host).argv('--list-archives'), stdout=slave,
                stderr=slave, stdin=slave) as child:
            os.close(slave)
            text = b''
            while True:
                try:
                    data = os.read(name, 4096)
                except OSError:
                    break
                if not data:
                    break
                text += data
            os.close(name)
        self.assertEqual((child.returncode, text), (0, b'bell\\a\r\n'))
        self.assertEqual(readlab.Program(host).run('--list-archives'),
                         (0, b'bell\a\n', b''))


class Contents(Case):
    """CLI contract 3.4."""

    def paths(self, *args, **options):
        return self.out('-t', '-f', FIRST, *args, **options).splitlines()

    def test_plain(self):
        self.assertEqual(self.paths(), [
            b'./', b'./docs/', b'./docs/a', b'./docs/b', b'./docs/deep/',
            b'./docs/deep/c', b'./docs/hard', b'./empty', b'./names/',
            b'./names/bad\\377', b'./names/caf\xc3\xa9',
            b'./names/new\\nline', b'./names/tab\\tback\\\\slash', b'./pipe',
            b'./set', b'./soft', b'./sticky/'])

    def test_names_under_LANG_C(self):
        env = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
        self.assertEqual(self.paths(run=PROGRAM.real, env=env),
                         self.paths())

    def test_long_lines(self):
        me = (os.getuid(), os.getgid())
        owner = '%-6d %d' % me
        rest = 13 - len('%d' % me[1])

        def line(mode, size, name):
            return ('%s  0 %s%s 2019-08-26 18:30:46 %s' % (
                mode, owner, str(size).rjust(rest), name)).encode()

        self.assertEqual(
            self.out('-tv', '--iso-dates', '--numeric-owner', '-f', FIRST,
                     'docs', 'empty', 'pipe', 'set', 'soft', 'sticky')
            .splitlines(), [
                line('drwxr-xr-x', 0, './docs/'),
                line('-rw-r--r--', 6, './docs/a'),
                line('-rw-------', 26628, './docs/b'),
                line('drwxr-xr-x', 0, './docs/deep/'),
                line('-rwxr-xr-x', 6, './docs/deep/c'),
                line('hrw-r--r--', 0, './docs/hard link to ./docs/a'),
                line('-r--r--r--', 0, './empty'),
                line('prw--w--w-', 0, './pipe'),
                line('-rwsr-xr-x', 6, './set'),
                line('lrwxrwxrwx', 0, './soft -> docs/b'),
                line('drwxrwxrwt', 0, './sticky/')])

    def test_default_dates(self):
        line, = self.out('-tv', '-f', FIRST, 'empty').splitlines()
        self.assertRegex(line, rb' Aug 26  2019 \./empty$')

    def test_a_new_file_shows_its_time(self):
        lab, host = readlab.shared()
        when = int(time.time()) - 86400
        readlab.file_make(os.fsencode(lab.path('tree', 'new')), b'', 0o644)
        os.utime(lab.path('tree', 'new'), (when, when))
        host.create('now', 'new')
        line = readlab.Program(host).run('-tvf', 'now')[1]
        at = time.gmtime(when)
        self.assertTrue(line.endswith(b' %s %2d %02d:%02d new\n' % (
            time.strftime('%b', at).encode(), at.tm_mday, at.tm_hour,
            at.tm_min)), line)

    def test_vv_ends_with_a_footer(self):
        lines = self.out('-tvvf', FIRST).splitlines()
        self.assertEqual(lines[:-1], self.out('-tvf', FIRST).splitlines())
        self.assertRegex(lines[-1], b'^Archive Format: ')

    def test_null_output(self):
        self.assertEqual(
            self.out('-t', '--null-output', '-f', FIRST, 'names'),
            b'./names/\0./names/bad\xff\0./names/caf\xc3\xa9\0'
            b'./names/new\nline\0./names/tab\tback\\slash\0')
        self.assertEqual(
            self.out('-tv', '--null-output', '--iso-dates',
                     '--numeric-owner', '-f', FIRST, 'docs/b').split(b'\0\0'),
            [b'-rw-------', b'0', b'%d' % os.getuid(), b'%d' % os.getgid(),
             b'26628', b'2019-08-26 18:30:46', b'./docs/b\0'])

    def test_O_lists_on_stderr(self):
        self.assertEqual(PROGRAM.run('-tO', '-f', FIRST, 'soft'),
                         (0, b'', b'./soft\n'))

    def test_strip_components(self):
        self.assertEqual(
            self.paths('--strip-components', '2', 'docs', 'soft'),
            [b'a', b'b', b'deep/', b'deep/c', b'hard'])
        self.assertTrue(self.out(
            '-tv', '--strip-components', '2', '-f', FIRST,
            'docs').endswith(b' hard link to a\n'))

    def test_unmatched_operands(self):
        status, out, err = PROGRAM.run('-t', '-f', FIRST, 'soft', 'none',
                                       '*.x')
        self.assertEqual((status, out), (1, b'./soft\n'))
        self.assertEqual(err, b'tarsnap: none: Not found in archive\n'
                              b'tarsnap: *.x: Not found in archive\ntarsnap: '
                              b'Error exit delayed from previous errors.\n')

    def test_q_stops_when_each_operand_was_found(self):
        for operands, wanted in (
                (['docs/*'], [b'./docs/a']),
                (['d*'], [b'./docs/', b'./docs/a', b'./docs/b',
                          b'./docs/deep/', b'./docs/deep/c',
                          b'./docs/hard']),
                (['docs/deep', '*set'], [b'./docs/deep/', b'./docs/deep/c',
                                         b'./set'])):
            with self.subTest(operands):
                self.assertEqual(self.paths('-q', *operands), wanted)

    def test_no_such_archive(self):
        self.assertEqual(PROGRAM.run('-tf', 'none'), (
            1, b'', b'tarsnap: Archive does not exist: none\n'
            b'tarsnap: Error reading archive\n'
            b'tarsnap: Error exit delayed from previous errors.\n'))

    def test_backslash_takes_each_wildcard_away(self):
        lab, host = readlab.shared()
        names = ['a*', 'a?', 'a[b', 'a]b', 'a{b', 'a}b', 'axb']
        for name in names:
            readlab.file_make(os.fsencode(lab.path('tree', 'w', name)), b'',
                              0o644)
        host.create('w', 'w')
        program = readlab.Program(host)
        for name in names:
            with self.subTest(name):
                escaped = re.sub(r'([*?\[\]{}])', r'\\\1', 'w/' + name)
                self.assertEqual(program.run('-tf', 'w', escaped),
                                 (0, os.fsencode('w/%s\n' % name), b''))


class Parsers(Case):
    """CLI contract 6.3, 6.4, 6.5, 6.11: what others do with -tv."""

    MONTHS = 'Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec'.split()

    def lines(self, *args):
        return self.out(*args, run=PROGRAM.real).decode(
            'utf-8', 'replace').splitlines()

    def test_gui(self):
        # mode, links, user, group, size, three words of date, name
        line = re.compile(
            r'^(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+\s+\S+\s+\S+)\s+'
            r'(.+)$')
        for text in self.lines('-P', '-tv', '-f', FIRST):
            found = line.match(text)
            self.assertIn(found[1][0], '-dlhp')
            self.assertTrue(found[5].isdigit())
            self.assertIn(found[6].split()[0], self.MONTHS)
            self.assertTrue(found[7].startswith('./'), text)

    def test_snapback(self):
        for text in self.lines(
                '--quiet', '--no-print-stats', '-v', '--iso-dates',
                '--numeric-owner', '-t', '-f', FIRST):
            words = text.split(None, 7)
            self.assertEqual(len(words), 8)
            self.assertEqual(len(words[0]), 10)
            self.assertEqual((words[2], words[3]),
                             (str(os.getuid()), str(os.getgid())))
            datetime.datetime.strptime(' '.join(words[5:7]),
                                       '%Y-%m-%d %H:%M:%S')

    def test_redsnapper(self):
        # Options after -tvf NAME, then a directory.
        for line in self.lines('-tvf', FIRST, '--quiet', 'docs'):
            words = line.split(None, 8)
            self.assertEqual(len(words), 9)
            self.assertIn(words[5], self.MONTHS)
            self.assertRegex(words[7], r'^(\d{4}|\d\d:\d\d)$')
            self.assertEqual(words[0][0] == 'd', words[8].endswith('/'))

    def test_deuza(self):
        line = re.compile(r'^[-dlhpcb][-rwxsStT]{9}[+ ] +\d+ +\S+ +\S+ +'
                          r'[\d,]+ \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S')
        for text in self.lines('-tv', '--iso-dates', '-f', FIRST):
            self.assertRegex(text, line)


if __name__ == '__main__':
    unittest.main()
