# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The programs people drive tarsnap with, call by call.

For each its command lines in its order, and its own way of reading what comes
back; `tarsnapper` is run itself, as PyPI has it.  All of them find a command
`tarsnap` on the PATH and a configuration with keyfile and cachedir.
"""

import csv
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import time
import unittest
import venv

import world
from world import PASSWORD, USER

DATE = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d'


class Wrapper(unittest.TestCase):
    """A machine with a configuration, its commands on the PATH."""

    kind = 'dir'
    config = ''

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, cls.kind)
        w.keygen()
        for name in ('docs/a.txt', 'docs/b c.txt', 'docs/deep/er/d'):
            world.write(w.path('tree', name), name.encode() * 50)
        world.write(w.path('tree', 'etc', 'conf'), world.noise(50000, 1))
        os.symlink('a.txt', w.path('tree', 'docs', 'link'))
        os.chmod(w.path('tree', 'etc', 'conf'), 0o640)
        with open(w.path('tarsnap.conf'), 'w') as file:
            file.write('keyfile %s\ncachedir %s\n%s' % (
                w.key, w.path('cache'), cls.config))
        cls.commands(w)
        cls.env = dict(w.environment, PATH='%s:%s' % (
            w.path('bin'), w.environment['PATH']))
        w.ok('--fsck')

    @classmethod
    def commands(cls, w):
        """Scripts named as the commands that pip makes."""
        os.mkdir(w.path('bin'))
        more = '--no-default-config --configfile %s' % w.path('tarsnap.conf')
        for name, words in (
                ('tarsnap', '%s %s' % (w.program('tarsnap'), more)),
                ('tarsnap-keymgmt', '%s keymgmt' % w.program('keygen'))):
            path = w.path('bin', name)
            with open(path, 'w') as file:
                file.write('#!/bin/sh\nexec %s %s "$@"\n'
                           % (sys.executable, words))
            os.chmod(path, 0o755)

    def sh(self, script, code=0, **env):
        """A shell script in the tree; its Done."""
        done = self.world.run(['sh', '-c', script], cwd=self.world.path(
            'tree'), env=dict(self.env, **env))
        if code is not None:
            self.assertEqual(done.code, code, (script, done))
        return done

    def quiet(self, script, **env):
        """One that succeeds and says nothing on stderr; its output."""
        done = self.sh(script, **env)
        self.assertEqual(done.err, '', script)
        return done.out

    def names(self):
        return sorted(self.quiet('tarsnap --list-archives').splitlines())

    def tearDown(self):
        names = self.names()
        if names:
            self.sh('tarsnap -d ' + ' '.join(
                "-f '%s'" % name for name in names))


class Acts(Wrapper):
    """6.1: sh, lists, makes, copies by @@, prunes one by one."""

    def test_its_calls(self):
        self.assertEqual(self.quiet('tarsnap --list-archives | sort -n'), '')
        root = self.world.path('tree')
        options = '--one-file-system --humanize-numbers'
        day = 'host-daily-2026-11-22_01:02:03-docs'
        self.quiet('tarsnap -c -f %s -C %s %s docs 2>&1'
                   % (day, root, options))
        for kind in ('monthly', 'yearly'):
            self.quiet('tarsnap -c -f %s %s @@%s 2>&1' % (
                day.replace('daily', kind), options, day))
        listed = self.quiet('tarsnap --list-archives | sort -n')
        for kind in ('daily', 'monthly', 'yearly'):
            self.assertRegex(listed, re.compile(
                '^host-%s-2026-11-22_01:02:03-docs$' % kind, re.M))
        self.quiet('tarsnap -d -f %s' % day)
        self.quiet('mkdir ../acts && tarsnap -x -f %s -C ../acts'
                   % day.replace('daily', 'yearly'))
        self.assertEqual(self.quiet('diff -r docs ../acts/docs'), '')

    def test_its_cost_estimate(self):
        done = self.sh('tarsnap --dry-run --quiet --print-stats '
                       '--humanize-numbers -C / -c %s' % os.getcwd())
        self.assertEqual(done.out, '')
        self.assertRegex(done.err, r'This archive +\d[\d.]* [kM]?B +\d')


class Tarsnapper(Wrapper):
    """6.2: the program itself, on a pty, through make, list and expire."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.venv = cls.world.path('venv')
        venv.create(cls.venv, with_pip=True)
        found = subprocess.run(
            [os.path.join(cls.venv, 'bin', 'pip'), '-q', 'install',
             'tarsnapper'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if found.returncode:
            raise unittest.SkipTest('pip cannot install tarsnapper')
        with open(cls.world.path('jobs.yml'), 'w') as file:
            file.write('deltas: 1d 7d 30d\n'
                       'target: $name-$date\n'
                       'jobs:\n  tree:\n    source: %s\n    excludes:\n'
                       '      - "*.txt"\n' % cls.world.path('tree'))

    def tarsnapper(self, *words, give=b''):
        """Run it on a terminal and type `give`; what the terminal showed."""
        pid, fd = pty.fork()
        if not pid:
            program = os.path.join(self.venv, 'bin', 'tarsnapper')
            os.chdir(self.world.root)
            os.execve(program, [program, '-c', self.world.path('jobs.yml'),
                                *words], self.env)
        shown = b''
        while True:
            try:
                piece = os.read(fd, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
            if give and b'key: ' in shown:
                os.write(fd, give)
                give = b''
        os.close(fd)
        _, status = os.waitpid(pid, 0)
        self.assertEqual(status, 0, shown)
        return shown.decode()

    def test_make_list_expire(self):
        for day in ('20260101', '20260102', '20260801', '20260802'):
            self.quiet('tarsnap -c -f tree-%s-120000 docs' % day)
        self.tarsnapper('make')
        made = [name for name in self.names()
                if not name.startswith(('tree-202601', 'tree-202608'))]
        self.assertEqual(len(made), 1)
        self.assertNotIn('a.txt', self.quiet('tarsnap -tf ' + made[0]))
        shown = self.tarsnapper('list')
        listed = re.findall(r'^  (\S+)\r$', shown, re.M)
        self.assertEqual(sorted(listed), self.names())
        before = len(listed)
        self.tarsnapper('expire')
        self.assertLessEqual(len(self.names()), before)
        self.assertIn(made[0], self.names())

    def test_options_in_front(self):
        self.quiet('tarsnap -c -f tree-20260801-120000 docs')
        shown = self.tarsnapper('-o', 'v', '-o', 'humanize-numbers', '-',
                                'list')
        self.assertIn('  tree-20260801-120000\r\n', shown)

    def test_passphrase(self):
        secret = self.world.path('secret.key')
        done = self.world.tool(
            'keymgmt', '--outkeyfile', secret, '-r', '-w', '-d',
            '--passphrased', '--passphrase-mem', '2000000',
            '--passphrase-time', '0.1', self.world.key,
            give=b'word\nword\n')
        self.assertEqual(done.code, 0, done)
        self.quiet('tarsnap -c -f tree-20260801-120000 docs')
        shown = self.tarsnapper('-o', 'keyfile', secret, '-', 'list',
                                give=b'word\n')
        self.assertIn('  tree-20260801-120000\r\n', shown)


class Gui(Wrapper):
    """6.3: the Qt program."""

    def gui(self, words, code=0):
        return self.sh('tarsnap --no-default-config --keyfile %s --cachedir '
                       '%s --maxbw-rate-down 100000000 --maxbw-rate-up '
                       '100000000 %s' % (self.world.key,
                                         self.world.path('cache'), words),
                       code)

    def test_version(self):
        version = re.fullmatch(r'tarsnap (\S+)\s?',
                               self.quiet('tarsnap --version'))[1]
        parts = [int(part) for part in version.split('-')[0].split('.')]
        self.assertGreaterEqual(len(parts), 3)
        self.assertGreaterEqual(parts, [1, 0, 39])

    def test_a_job(self):
        stamp = 1700000000
        done = self.gui('--creationtime %d --quiet --print-stats '
                        '--no-humanize-numbers -c -f Job_docs --exclude '
                        '"*.tmp" docs etc' % stamp)
        lines = done.err.splitlines()
        self.assertGreaterEqual(len(lines), 5)
        this = [line for line in lines
                if re.match(r'^This archive\s+(\d+)\s+(\d+)$', line)]
        new = [line for line in lines
               if re.match(r'^New data\s+(\d+)\s+(\d+)$', line)]
        self.assertEqual((len(this), len(new)), (1, 1), done)

        listed = self.gui('--list-archives -vv').out.splitlines()
        found = re.match(r'^(.+)\t+(\S+\s+\S+)\t+(.+)$', listed[0])
        self.assertEqual(found[1], 'Job_docs')
        self.assertEqual(found[2], '2023-11-14 22:13:20')
        self.assertNotIn(' -P ', found[3])

        stats = self.gui('--print-stats --no-humanize-numbers -f Job_docs'
                         ).out.splitlines()
        self.assertGreaterEqual(len(stats), 5)
        self.assertTrue(any(re.match(r'^Job_docs\s+(\d+)\s+(\d+)$', line)
                            for line in stats))
        self.assertTrue(any(re.match(r'^\s+\(unique data\)\s+(\d+)\s+(\d+)$',
                                     line) for line in stats))
        overall = self.gui('--print-stats --no-humanize-numbers'
                           ).out.splitlines()
        self.assertRegex(overall[1], r'^All archives\s+(\d+)\s+(\d+)$')
        self.assertRegex(overall[2], r'\(unique data\)')

        rows = self.gui('-tv -f Job_docs').out.splitlines()
        for row in rows:
            self.assertRegex(row, r'^(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s+(\d+)'
                             r'\s+(\S+\s+\S+\s+\S+)\s+(.+)$')
        self.assertEqual(len(rows), 9)

        out = self.world.path('gui-out')
        os.mkdir(out)
        done = self.sh('printf "docs/a.txt\\netc/conf" | tarsnap -x -C %s -p '
                       '-T - -f Job_docs' % out)
        self.assertEqual(sorted(os.listdir(out)), ['docs', 'etc'])
        self.gui('-x -C %s -k --keep-newer-files -f Job_docs' % out, None)
        self.gui('-r -f Job_docs > ../gui.tar')
        self.assertIn('docs/b c.txt', self.quiet('tar tf ../gui.tar'))

        done = self.gui('--print-stats -d -f Job_docs')
        last = done.err.splitlines()[-5:]
        self.assertRegex(last[1], r'^All archives +\d')
        self.assertRegex(last[4], r'^Deleted data +\d')

    def test_stopped_and_saved(self):
        world.write(self.world.path('large'), world.noise(world.MIB, 7) * 60)
        running = self.world.spawn(
            ['tarsnap', '--maxbw-rate-up', '2000000', '-c', '-f', 'stopped',
             '-C', self.world.root, 'large'], env=self.env)
        time.sleep(1.5)
        running.send(3)
        done = running.wait()
        if done.code:               # else it was done before
            self.assertIn('tarsnap: Archive truncated', done.err)
            self.assertEqual(self.names(), ['stopped.part'])
        os.unlink(self.world.path('large'))

    def test_repair_and_end(self):
        self.quiet('tarsnap -c -f one docs')
        self.quiet('tarsnap -c -f two etc')
        for mode in ('--fsck', '--fsck-prune'):
            out = self.gui(mode).out
            for phase in '12345':
                self.assertRegex(out, re.compile('^Phase %s' % phase, re.M))
            self.assertIn('Phase 5: Identifying unreferenced chunks\n', out)
            found = re.findall(r'  Archive (\d+)/(\d+)...', out)
            self.assertEqual(found[-1], ('2', '2'))
        done = self.sh('printf "No Tomorrow\\n" | tarsnap --nuke')
        self.assertEqual(done.code, 0)
        self.assertEqual(self.names(), [])
        self.sh('tarsnap --fsck')

    def test_key_id(self):
        self.assertRegex(self.quiet('tarsnap-keymgmt --print-key-id %s'
                                    % self.world.key), r'^\d+\n$')


class Snapback(Wrapper):
    """6.4: creachadair/tarsnap and snapback."""

    BASE = 'tarsnap --quiet --no-print-stats '

    def test_its_calls(self):
        tree = self.world.path('tree')
        tag = self.world.path('cache', 'cseq')
        self.quiet(self.BASE + '-c -f a.1 -C %s -H --store-atime '
                   '--creationtime 1700000000 -s "/^docs/papers/" '
                   '--exclude "*.bak" -- docs etc' % tree)
        first = os.readlink(tag)
        listed = self.quiet(self.BASE + '--list-archives -v')
        self.assertEqual(listed, 'a.1\t2023-11-14 22:13:20\n')
        rows = self.quiet(self.BASE + '-v --iso-dates --numeric-owner -t -f '
                          'a.1').splitlines()
        for row in rows:
            fields = row.split(None, 7)
            self.assertEqual(len(fields), 8, row)
            self.assertEqual(len(fields[0]), 10)
            int(fields[2]), int(fields[3]), int(fields[4])
            self.assertRegex(' '.join(fields[5:7]), '^%s$' % DATE)
        self.assertTrue(any(row.endswith(' papers/a.txt') for row in rows))
        sizes = self.quiet(self.BASE + '--print-stats --no-humanize-numbers '
                           '-f a.1')
        found = re.findall(r'^\s*(.*?)\s+(\d+)\s+(\d+)$', sizes, re.M)
        self.assertEqual([row[0] for row in found], [
            'All archives', '(unique data)', 'a.1', '(unique data)'])
        out = self.world.path('snap-out')
        os.mkdir(out)
        for more in ('-p -o --fast-read', '-p --resume-extract'):
            self.quiet(self.BASE + '-x -f a.1 -C %s %s -- papers/a.txt'
                       % (out, more))
        self.assertEqual(os.listdir(os.path.join(out, 'papers')), ['a.txt'])
        self.quiet(self.BASE + '-c -f a.2 -C %s --dry-run -- docs' % tree)
        self.assertEqual(os.readlink(tag), first)
        self.quiet(self.BASE + '-c -f a.2 -C %s -- docs' % tree)
        self.assertNotEqual(os.readlink(tag), first)
        self.quiet(self.BASE + '-d -f a.1 -f a.2')

    def test_first_line_is_the_error(self):
        done = self.sh(self.BASE + '-d -f none', 1)
        self.assertEqual(done.lines[0],
                         'tarsnap: Archive does not exist: none')


class Redsnapper(Wrapper):
    """6.5: ten extracts at a time."""

    def test_its_calls(self):
        w = self.world
        odd = 'docs/[odd]*{x}?'
        world.write(w.path('tree', odd), b'odd')
        self.addCleanup(os.unlink, w.path('tree', odd))
        self.quiet('tarsnap -c -f red docs etc')
        names = []
        for row in self.quiet('tarsnap -tvf red --no-quiet docs'
                              ).splitlines():
            fields = row.split(None, 8)
            self.assertEqual(len(fields), 9, row)
            time.strptime(' '.join(fields[5:7]), '%b %d')
            if not fields[8].endswith('/'):
                names.append(fields[8].split(' -> ')[0])
        self.assertEqual(len(names), 5)
        out = w.path('red-out')
        os.mkdir(out)
        running = []
        for number in range(10):
            name = names[number % len(names)]
            running.append(w.spawn(
                ['tarsnap', '-xvf', 'red', '-C', out,
                 re.sub(r'([*?\[\]{}])', r'\\\1', name)], env=self.env))
        for each in running:
            done = each.wait()
            for line in done.err.splitlines():
                self.assertRegex(line, r'^x docs/')
        self.assertEqual(self.quiet('diff -r docs %s/docs' % out), '')

    def test_its_error_line(self):
        self.quiet('tarsnap -c -f red docs')
        done = self.sh('tarsnap -xvf red none', 1)
        self.assertIn('tarsnap: Error exit delayed from previous errors.',
                      done.err.splitlines())


class Prunes(Wrapper):
    """6.6 level12, 6.7 old-archives, 6.8 Generations, 6.9 pruner."""

    def test_level12(self):
        for day in ('20260101', '20260201'):
            self.quiet('tarsnap -c -f host_%s-010203 docs' % day)
        out = self.quiet('tarsnap --list-archives > ../list; cat ../list')
        found = re.findall(r'^\S+_(\d{8}-\d{6})$', out, re.M)
        self.assertEqual(len(found), 2)
        self.quiet('tarsnap -d -f host_20260101-010203 '
                   '-f host_20260201-010203')

    def test_old_archives(self):
        self.quiet('tarsnap -c -f old docs')
        for line in self.quiet('tarsnap --list-archives -v').splitlines():
            name, date = line.split('\t')
            time.strptime(date, '%Y-%m-%d %H:%M:%S')
        done = self.sh('tarsnap -d -f old -f gone', 2)
        self.assertIn('Archive does not exist', done.err)

    def test_generations(self):
        name = 'host-2026-11-22-HOURLY-docs'
        self.quiet('tarsnap -c -f %s --one-file-system -C %s docs'
                   % (name, self.world.path('tree')))
        self.assertIn(name, self.quiet('tarsnap --list-archives'))
        self.quiet('for a in $(tarsnap --list-archives); do '
                   'tarsnap -d -f $a; done')
        self.assertEqual(self.names(), [])

    def test_pruner(self):
        w = self.world
        both = '--keyfile %s --cachedir %s' % (w.key, w.path('cache'))
        self.quiet('tarsnap -c -f old docs')
        self.quiet('$TARSNAP_COMMAND --list-archives --keyfile %s' % w.key,
                   TARSNAP_COMMAND='tarsnap')
        self.quiet('tarsnap --fsck %s >/dev/null' % both)
        self.quiet('tarsnap -d %s -f old >/dev/null' % both)


class Zabbix(Wrapper):
    """6.10: three lines of CSV, nothing else."""

    def test_its_call(self):
        self.quiet('tarsnap -c -f one docs')
        path = self.world.path('stats.csv')
        open(path, 'w').close()
        self.assertEqual(self.quiet('tarsnap --print-stats --csv-file %s && '
                                    'echo done' % path), 'done\n')
        with open(path, newline='') as file:
            rows = list(csv.reader(file))
        self.assertEqual([row[0] for row in rows], [
            'Archive name', 'All archives', '  (unique data)'])
        for row in rows[1:]:
            int(row[1]), int(row[2])


class Scripts(Wrapper):
    """6.11: smaller ones."""

    config = 'print-stats\nhumanize-numbers\ncheckpoint-bytes 1GB\n'

    def test_c4rlo(self):
        self.sh('tarsnap -L --exclude "*.o" -cf one docs')
        done = self.sh('tarsnap -cf one docs', 1)
        self.assertIn('archive already exists', done.err)
        self.assertRegex(done.err, r'^tarsnap: An archive already exists '
                         'with the name .*')
        self.sh('tarsnap -cf new @@one && tarsnap -df one')
        self.assertRegex(self.quiet('TZ=UTC tarsnap --list-archives -v'),
                         '^new\t%s\n$' % DATE)

    def test_stathat(self):
        done = self.sh('tarsnap -fone -c --no-humanize-numbers docs')
        self.assertRegex(done.err, r'This archive\s+(\d+)\s+(\d+)')
        self.sh('tarsnap -d -fone')

    def test_puppet(self):
        for day in ('01', '02', '03'):
            self.sh('tarsnap --key %s -c -f day-%s docs'
                    % (self.world.key, day))
        self.sh('tarsnap --list-archives | sort -rn | sed 1,2d | '
                'xargs -rn1 tarsnap -d -f')
        self.assertEqual(self.names(), ['day-02', 'day-03'])

    def test_nixos(self):
        conf = self.world.path('tarsnap.conf')
        self.sh('tarsnap --configfile %s -c -f host-1 -v -H -L docs' % conf)
        self.sh('( flock 9; tarsnap --configfile %s --fsck ) 9< %s'
                % (conf, self.world.path('cache', 'lockf')))
        self.sh('tarsnap --configfile %s -x -f "$(tarsnap --configfile %s '
                '--list-archives | sort | tail -1)" -v -C ..' % (conf, conf))

    def test_opencraft(self):
        self.sh('tarsnap -c -f one docs')
        cache = self.world.path('cache')
        kept = cache + '.kept'
        os.rename(cache, kept)
        self.addCleanup(shutil.rmtree, kept)
        done = self.sh('tarsnap -c -f two docs', None)
        self.assertNotEqual(done.code, 0)
        self.assertIn('--fsck', done.out + done.err)
        self.sh('tarsnap --fsck && tarsnap -c -f two docs')

    def test_deuza(self):
        self.quiet('tarsnap --verify-config')
        self.sh('tarsnap --quiet --no-print-stats -c -f one docs')
        self.quiet('tarsnap --no-aggressive-networking --list-archives')
        out = self.quiet('tarsnap --no-aggressive-networking --print-stats '
                         "| awk '/All archives/ { print $(NF-1), $NF }'")
        self.assertRegex(out, r'^\S+ \S+\n$')
        self.assertRegex(self.quiet('tarsnap -tv --iso-dates -f one'), DATE)
        self.quiet('tarsnap --quiet --no-print-stats -d -f one')

    def test_docker_images(self):
        self.quiet('tarsnap-keymgmt --print-key-permissions %s | '
                   'grep writing >/dev/null' % self.world.key)
        self.sh('tarsnap -c -f one docs; tarsnap -c -f two docs; '
                'printf "one\\ntwo\\n" > ../names')
        done = self.sh('tarsnap -d --archive-names ../names --print-stats '
                       '--humanize-numbers')
        self.assertEqual(done.err.count('All archives'), 2)

    def test_wshanks(self):
        self.sh('tarsnap -c -f "a name: with blanks" docs')
        self.assertRegex(self.quiet('tarsnap -v --list-archives'),
                         '^a name: with blanks\t%s\n$' % DATE)

    def test_snapclean(self):
        self.sh('tarsnap --no-print-stats -c -f one docs')
        self.quiet('tarsnap --list-archives')
        self.quiet('tarsnap --no-print-stats -d -f one')


class Chef(Wrapper):
    """6.11: keygen under expect, against a real server."""

    kind = 'tls'

    def test_keygen_on_a_terminal(self):
        w = self.world
        path = w.path('chef.key')
        pid, fd = pty.fork()
        if not pid:
            os.execve(sys.executable, [
                sys.executable, w.program('keygen'), '--keyfile', path,
                '--user', USER, '--machine', 'chef', '--server', w.address,
                '--fingerprint', w.server.pin], self.env)
        timer = threading.Timer(60, os.kill, (pid, 9))
        timer.start()
        shown = b''
        while not shown.endswith(b'Enter tarsnap account password: '):
            shown += os.read(fd, 1024)
        os.write(fd, PASSWORD.encode() + b'\n')
        try:
            while os.read(fd, 1024):
                pass
        except OSError:
            pass
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        os.close(fd)
        self.assertEqual(status, 0)
        self.assertTrue(os.path.exists(path))


if __name__ == '__main__':
    unittest.main()
