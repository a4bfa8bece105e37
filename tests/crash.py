#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Kills, power cuts and failing calls, by count; nothing may be lost.

usage: tests/crash.py [--seed N] [--seconds N] [--count N] [PART ...]

The parts (all, if none is named; each gets its share of the seconds, and ends
after so many kills, cuts or faults):

    dir     the client with a store directory
    tls     the same with a server
    s3      the same with a server whose store is a bucket

Whoever works is killed, or the power of its host is cut, and what was not
synced is gone: at the n-th call of a command, at one of STEPS, which are
taken in turn, or at any moment; or right after it has said that all is well,
also where somebody was killed on the way there.  The programs run in real
processes with faults.c below them, which sees what SQLite does as well.  After
some of these: what is listed is what was acknowledged (or was under way), it
restores bit for bit, the client goes on with the cache directory it has, the
index is what a rebuild makes of the log, nothing is damaged, and what the
cache directory counts is what it refers to, and what --fsck counts.

The last line is the report.  `corrupt` and `lost` (committed data that is not
there) must be 0, or the exit status is 1; `failed` commands are allowed.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import faults                                   # noqa: E402
import lab                                      # noqa: E402
import tarsnap                                  # noqa: E402
import tarsnapd                                 # noqa: E402
import world                                    # noqa: E402
from faults import AFTER, KILL, NETWORK, TORN, WRITES   # noqa: E402

SERVER_SECONDS = 20             # most for a server to come, or to end
RUN_SECONDS = 100               # after which a command hangs
# The client's between two tries, in seconds: a server comes back at once.
SHORT_WAITS = (0,) + (0.1,) * 150


class Report(collections.Counter):
    """What was done, and what came of it."""

    WORDS = ('runs', 'kills', 'power cuts', 'faults', 'corrupt',
             'lost committed', 'failed')

    def __init__(self):
        super().__init__()
        self.steps = collections.Counter()      # of STEPS, that were met
        self.tried = collections.Counter()      # and that were aimed at

    def add(self, other):
        """What another one says, too."""
        self.update(other)
        self.steps.update(other.steps)
        self.tried.update(other.tried)

    def __str__(self):
        return ', '.join('%d %s' % (self[word], word)
                         for word in self.WORDS)


class Broken(Exception):
    """A promise was not kept; `kind` is 'corrupt' or 'lost committed'."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


class Case:
    """As much of a TestCase as world.World needs."""

    def __init__(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup = self.stack.callback


##############################################################################
# Processes
##############################################################################


def child(work):
    """Fork a process that does `work` and ends as it says; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 99
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faults.mute(False)
        try:
            status = work()
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


class Client:
    """One command in a process of its own; what it says goes to a file."""

    def __init__(self, argv, said, main=None, patch=contextlib.nullcontext):
        self.argv = argv
        self.said = said
        self.main = main            # of the program, the client's if None
        self.patch = patch          # makes what changes the program in there
        self.pid = child(self.work)
        self.code = None            # exit status, -9 if it was killed
        self.end = time.monotonic() + RUN_SECONDS

    def work(self):
        with self.patch():
            result = lab.run(self.argv, self.main)
        with open(self.said, 'w', errors='surrogateescape') as file:
            file.write(result.out + '\0' + result.err)
        return result.status

    def over(self):
        """True once it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > self.end:
                os.kill(self.pid, signal.SIGKILL)
                raise Broken('corrupt', 'hangs: %r' % self.argv)
        return self.code is not None

    def texts(self):
        """(stdout, stderr)"""
        try:
            with open(self.said, errors='surrogateescape') as file:
                return file.read().split('\0')
        except FileNotFoundError:
            return '', ''


def server_main(argv):
    """A command of the server, as tarsnap.main would end."""
    sys.exit(tarsnapd.main(argv[1:]))


SERVER_COMMANDS = ('clean', 'scrub')

# Where a process dies with a name to it: the calls, as Faults.set() wants
# them, by who makes them and what for.  They are met before or after their
# effect, or with half of it.  A + is in the names of what is in tmp/.
CACHE_STEPS = ('o directory-journal', 'w directory-journal',
               'f directory-journal', 'w /directory', 'f /directory',
               'u directory-journal', 's cseq', 'r cseq')
COMMIT_STEPS = ('o spool/', 'w spool/', 'f spool/', 'l store/seg/',
                'f store/seg/', 'u spool/', 'o +', 'w +', 'f +',
                'l store/log/', 'f store/log/', 'u +', 'w index/',
                'f index/')
STEPS = {
    'client': {
        'create': ('o pending', 'w pending', 'f pending', 'u pending',
                   'o cache-journal', 'w /cache', *CACHE_STEPS),
        'delete': CACHE_STEPS,
        'undelete': CACHE_STEPS,
        'recover': ('u pending', *CACHE_STEPS),
        'fsck': ('m fsck', 'w fsck/', 'u fsck', 'u pending', 'r /directory',
                 'r cseq'),
    },
    'server': {
        'create': COMMIT_STEPS,
        'delete': COMMIT_STEPS,
        'undelete': COMMIT_STEPS,
        'clean': ('l store/list/', 'f store/list/', 'u store/seg/',
                  *COMMIT_STEPS),
        'scrub': ('l store/list/', 'f store/list/', 'w scrub', 'f scrub',
                  'r scrub', 'u scrub'),
    },
}
WAYS = {KILL: 'before', AFTER: 'after', TORN: 'amid'}


##############################################################################
# Story
##############################################################################


class Story:
    """A store of some kind, one machine, and all that happens to them."""

    def __init__(self, kind, dice, report, init=(), env=()):
        self.kind = kind
        self.dice = dice
        self.report = report
        self.case = Case()
        self.log = faults.Log(os.environ['FAULTS_LOG'])
        self.log.skip()
        self.mine = faults.Faults(os.environ['FAULTS_STATE'])
        self.mine.set()
        clean = {name: os.environ.pop(name) for name in
                 ('LD_PRELOAD', 'FAULTS_STATE', 'FAULTS_LOG')}
        try:
            self.world = world.World(self.case, kind, init=init, env=env)
            self.world.keygen()
        finally:
            os.environ.update(clean)
        self.case.addCleanup(self.stop)
        self.tree = self.world.path('tree')
        self.cache = self.world.path('cache')
        os.mkdir(self.cache, 0o700)
        self.server = self.world.server
        self.home = self.server.path if self.server else self.world.address
        self.theirs = None          # the Faults of a server
        self.client = None          # the command that was started last
        self.deaths = 0             # of the server
        self.gone = []              # archives that were deleted
        self.seconds = {}           # words -> how long a run of them takes
        if self.server:
            self.theirs = faults.Faults(self.world.path('state'))
            self.theirs.watch(self.home)
            self.world.environment.update(
                clean, FAULTS_STATE=self.theirs.path)
            self.ours = [self.cache]
            self.restart()
        else:
            self.ours = [self.home, self.cache]
        self.disk = faults.Disk(self.home, self.cache)
        self.models = {}            # archive -> snapshot of its tree
        self.sure = set()           # archives that were acknowledged
        self.open = set()           # those that may come to be
        self.doomed = set()         # those that may be gone
        self.number = 0
        self.calls = {}             # words -> calls a run of them makes
        self.past = []              # what was done, for who must find out
        self.kept = None            # a copy of the world, if that is broken
        self.tree_make()
        # Then what is deleted is still there to be undeleted.
        if dice.random() < 0.5:
            self.daemon('machine', self.home, 'delete-delay',
                        self.machine(), '1')
            self.unlogged()

    def machine(self):
        """The number of the machine, as the server prints it."""
        return self.daemon('machine', self.home, 'list').split()[0]

    def end(self):
        """Nothing stays behind."""
        if self.client and self.client.code is None:
            os.kill(self.client.pid, signal.SIGKILL)
            os.waitpid(self.client.pid, 0)
        self.case.stack.close()

    def stop(self):
        self.mine.set()
        if self.server:
            self.server.kill()

    # The tree.

    def tree_make(self):
        for number in range(12):
            world.write(os.path.join(self.tree, 'd%d' % (number % 3),
                                     'f%d' % number),
                        self.dice.randbytes(self.dice.randrange(5000)))
        world.write(os.path.join(self.tree, 'large'),
                    self.dice.randbytes(400000))

    def tree_change(self, much=False):
        """A day's work."""
        for _ in range(self.dice.randrange(1, 4)):
            world.write(os.path.join(
                self.tree, 'd%d' % self.dice.randrange(3),
                'f%d' % self.dice.randrange(20)),
                self.dice.randbytes(self.dice.randrange(5000)))
        if much:
            for number in range(4):
                world.write(os.path.join(self.tree, 'much%d' % number),
                            self.dice.randbytes(700000))
        elif self.dice.random() < 0.3:
            with open(os.path.join(self.tree, 'large'), 'r+b') as file:
                file.seek(self.dice.randrange(300000))
                file.write(self.dice.randbytes(1000))

    # Commands.

    def argv(self, words, cache=True):
        argv = ['--no-default-config', '--keyfile', self.world.key]
        return argv + (['--cachedir', self.cache] if cache else []) + [
            str(word) for word in words]

    def start(self, *words, cache=True):
        self.past.append(' '.join(map(str, words)))
        if words[0] in SERVER_COMMANDS:
            # It works on the server's directory, whoever serves that.
            self.mine.watch(self.home)
            return self.launch(words, server_main)
        self.mine.watch(*self.ours)
        return self.launch(self.argv(words, cache))

    def launch(self, argv, main=None, patch=contextlib.nullcontext):
        """A Client, with the same arguments."""
        self.report['runs'] += 1
        said = self.world.path('said')
        with contextlib.suppress(FileNotFoundError):
            os.unlink(said)
        self.client = Client(argv, said, main, patch)
        return self.client

    def wait(self, client, victim=None, moment=0):
        """Until it has ended; a server that dies is started again.

        With `moment`, this process is killed after so many seconds.
        """
        start = time.monotonic()
        while not client.over():
            if moment and time.monotonic() > start + moment:
                os.kill(victim, signal.SIGKILL)
                moment = 0
                if victim != client.pid:
                    self.server.running.process.wait()
            if self.server and self.server.running.process.poll() is not None:
                self.died()
            time.sleep(0.002)
        if self.server and self.server.running.process.poll() is not None:
            self.died()
        self.past.append('  -> %d %s' % (client.code,
                                         client.texts()[1].strip()[-300:]))
        return client.code

    def died(self):
        """The server was killed by what was armed; it starts again."""
        self.server.running.wait()
        if self.server.running.process.returncode != -signal.SIGKILL:
            raise Broken('corrupt', 'the server ended: %r' % (
                self.server.running.text(),))
        self.report['kills'] += 1
        self.deaths += 1
        if self.dice.random() < 0.5:
            if self.client.main and self.client.code is None:
                # The cleaner is on the same host.
                os.kill(self.client.pid, signal.SIGKILL)
                while not self.client.over():
                    time.sleep(0.002)
            self.power(self.home)
        self.restart()

    def restart(self):
        """End the server, if it runs, and start one that nothing hurts."""
        self.theirs.set(logging=1)
        if self.server.running.process.poll() is None:
            self.server.kill()
        self.server.start()

    def feed(self):
        """The disk has seen all there is in the log."""
        for op, *rest in self.log.records():
            if op != '!':
                self.disk.apply(op, *rest)
        self.log.skip()

    def power(self, *roots):
        """The power is cut: what was not synced is gone."""
        self.feed()
        self.report['power cuts'] += 1
        dice = self.dice if self.dice.random() < 0.5 else None
        self.past.append('  power cut of %s%s' % (
            ' '.join(map(os.path.basename, roots)),
            ', some of it arrived' if dice else ''))
        for root in roots:
            self.disk.leave(root, dice)
            self.disk.take(os.path.realpath(root))

    def good(self, *words, cache=True):
        """A command that nothing happens to; its stdout."""
        self.mine.set(logging=1)
        client = self.start(*words, cache=cache)
        if self.wait(client):
            raise Broken('corrupt', '%r: %d %s' % (
                words, client.code, client.texts()[1]))
        return client.texts()[0]

    def names(self):
        return set(self.good('--list-archives', cache=False).splitlines())

    def command(self):
        """The words of a command, by lot; what it is about is noted."""
        self.number += 1
        name = 'a%d' % self.number
        lot = self.dice.random()
        if lot < 0.15 and self.sure:
            name = self.dice.choice(sorted(self.sure))
            return 'delete', name, ['-d', '-f', name]
        if lot < 0.22 and self.gone:
            name = self.gone.pop(self.dice.randrange(len(self.gone)))
            return 'undelete', name, ['--undelete', '-f', name]
        if lot < 0.27:
            return 'fsck', '', ['--fsck']
        if lot < 0.30:
            return 'recover', '', ['--recover']
        if lot < 0.40:
            return 'clean', '', ['clean', self.home, '--abandon']
        if lot < 0.44:
            return 'scrub', '', ['scrub', self.home]
        if lot < 0.48 and self.sure:
            where = self.world.path('torn-out%d' % self.number)
            os.mkdir(where)
            return 'extract', '', ['-x', '-f', self.dice.choice(
                sorted(self.sure)), '-C', where]
        much = lot > 0.9
        self.tree_change(much)
        self.models[name] = lab.snapshot(self.tree)
        return 'create%d' % much, name, [
            '-c', '-f', name, *(['--checkpoint-bytes', '1000000'] * much),
            '-C', self.tree, '.']

    def hurt(self):
        """Run a command, and kill it, or the server, in its midst."""
        what, name, words = self.command()
        if what == 'delete':
            self.doomed.add(name)
        elif name:
            self.open.add(name)
        theirs = bool(self.server and self.dice.random() < 0.6)
        victim = self.theirs if theirs else self.mine
        self.mine.set(logging=1)
        moment, step, who = 0, None, (what, theirs)
        if self.dice.random() < 0.15:
            moment = self.dice.random() * self.seconds.get(what, 0.3)
            self.past.append('killed after %.3f s, the %s of:' % (
                moment, 'server' if theirs else 'client'))
        else:
            step, who = self.arm(victim, what, theirs)
        start, deaths = time.monotonic(), self.deaths
        client = self.start(*words)
        code = self.wait(client, self.server.running.process.pid if theirs
                         else client.pid, moment)
        met = victim.hits or self.deaths > deaths
        if not moment and not met:
            self.calls[who] = victim.count
            self.seconds[what] = time.monotonic() - start
        if step and met:
            self.report.steps[step] += 1
        (self.theirs or self.mine).set(logging=1)
        self.mine.set(logging=1)
        if code == -signal.SIGKILL:
            self.fell()
        else:
            self.ended(what, name, words, code)
        if what == 'extract':
            shutil.rmtree(words[-1])

    def arm(self, victim, what, theirs):
        """Have it die at a step whose turn it is, or at the n-th call.

        (the step, as Report.steps has it, or None; key of self.calls)
        """
        sides = ['server'] if theirs else ['client']
        if what in SERVER_COMMANDS:
            sides = ['server']
        elif not self.server:
            sides = ['client', 'server']
        work = what.rstrip('01')
        steps = [(side, work, step, how) for side in sides
                 for step in STEPS[side].get(work, ()) for how in WAYS
                 if how != TORN or step[0] == 'w']
        if steps and self.dice.random() < 0.5:
            self.dice.shuffle(steps)
            step = min(steps, key=self.report.tried.__getitem__)
            self.report.tried[step] += 1
            at = self.dice.choice((1, 1, 2))
            victim.set(at, step[3], 0, WRITES, 1, step[2])
            self.past.append('killed %s call %d of "%s" of %s:' % (
                WAYS[step[3]], at, step[2], 'server' if theirs else 'client'))
            return step, (what, theirs, step[2])
        mask, who = WRITES, (what, theirs)
        if self.server and self.dice.random() < 0.5:
            mask, who = WRITES | NETWORK, who + (True,)
        at = self.dice.randrange(1, self.calls.get(who, 60) + 2)
        how = self.dice.choice(list(WAYS))
        victim.set(at, how, 0, mask, 1)
        self.past.append('killed %s call %d of %s:' % (
            WAYS[how], at, 'server' if theirs else 'client'))
        return None, who

    def fell(self):
        """The command was killed; was it the power of its host?"""
        self.report['kills'] += 1
        if self.dice.random() < 0.5:
            return
        if self.client.main and self.server:
            self.server.kill()
            self.power(self.home)
            self.restart()
        else:
            self.power(*self.ours)

    def ended(self, what, name, words, code):
        """The command came to an end of its own."""
        if code == 0:
            self.acknowledged(what, name)
            if self.dice.random() < 0.3:
                self.rest()
        else:
            self.report['failed'] += 1
            self.error_clear(words, self.client)
        self.counted()

    def rest(self):
        """The power goes while nothing works."""
        if not self.server:
            self.power(*self.ours)
        elif self.dice.random() < 0.7:
            self.server.kill(signal.SIGKILL)
            self.power(self.home)
            self.restart()
        else:
            self.power(self.cache)

    def acknowledged(self, what, name):
        """The command said so, and so it is."""
        if what == 'delete':
            self.deleted(name)
        elif name:
            self.open.discard(name)
            self.sure.add(name)

    def deleted(self, name):
        """It is gone, and the last few can be undeleted."""
        self.sure.discard(name)
        self.doomed.discard(name)
        self.gone.append(name)
        for old in self.gone[:-5]:
            self.gone.remove(old)
            del self.models[old]

    @staticmethod
    def error_clear(words, client):
        """What failed must have said why, and how to go on."""
        said = client.texts()[1]
        if 'Traceback' in said or not said.strip() or client.code not in (
                1, 2, -signal.SIGTERM):
            raise Broken('corrupt', '%r: exit status %d: %s' % (
                words, client.code, said))

    # Checks.

    def check(self, whole=False):
        """All is as it must be; the client goes on."""
        names = self.names()
        self.hold(names)
        for name in self.stake(names, whole):
            self.compare(name)
        self.go_on()
        if whole or self.dice.random() < 0.3:
            self.count()
        if whole:
            self.rebuild()
            self.good('scrub', self.home)
        self.past.clear()

    def hold(self, names):
        """Names that are listed against what is known of them."""
        lost = self.sure - self.doomed - names
        if lost:
            raise Broken('lost committed', 'not listed: %s' % sorted(lost))
        plain = {name for name in names if not name.endswith('.part')}
        for name in plain - self.sure - self.open:
            raise Broken('corrupt', 'listed: %s' % name)
        self.sure = plain & (self.sure | self.open)
        self.open -= self.sure
        self.doomed &= self.sure

    def stake(self, names, whole):
        """Archives that are restored now: the newest and one by lot."""
        plain = sorted((name for name in names if name in self.models),
                       key=lambda name: int(name[1:]))
        return plain if whole else set(plain[-1:] + self.dice.sample(
            plain, min(1, len(plain))))

    def compare(self, name):
        where = tempfile.mkdtemp(dir=self.world.root)
        self.good('-x', '-p', '-f', name, '-C', where, cache=False)
        found = lab.snapshot(where)
        found[b''] = self.models[name][b'']
        lines = lab.difference(self.models[name], found)
        if lines:
            raise Broken('corrupt', '%s: %s' % (name, lines[:5]))
        shutil.rmtree(where)

    def go_on(self):
        """The next backup works, at the latest after --fsck."""
        self.number += 1
        name = 'a%d' % self.number
        self.tree_change()
        self.models[name] = lab.snapshot(self.tree)
        words = ['-c', '-f', name, '-C', self.tree, '.']
        self.mine.set(logging=1)
        client = self.start(*words)
        if self.wait(client):
            self.report['failed'] += 1
            self.error_clear(words, client)
            if '--fsck' not in client.texts()[1]:
                raise Broken('corrupt', 'does not go on: %s' %
                             client.texts()[1])
            self.good('--fsck')
            self.good(*words)
        self.sure.add(name)
        self.compare(name)
        # What it made of a sealed transaction is decided by now.
        names = self.names()
        self.hold(names)
        self.open.clear()
        self.doomed.clear()
        if len(self.sure) > 8:
            for name in sorted(self.sure, key=lambda x: int(x[1:]))[:4]:
                self.good('-d', '-f', name)
                self.deleted(name)
        for name in names:
            if name.endswith('.part'):
                self.good('-d', '-f', name)

    def daemon(self, *words):
        return self.world.tarsnapd(*words, env=dict(
            self.world.environment, LD_PRELOAD='')).out

    def unlogged(self):
        """What was just done to the server directory was not logged."""
        self.feed()
        self.disk.take(os.path.realpath(self.home))

    def rebuild(self):
        """The index is what the log makes of it."""
        for line in self.daemon('machine', self.home, 'list').splitlines():
            number = line.split()[0]
            before = self.daemon('index-dump', self.home, number)
            self.daemon('rebuild', self.home)
            if self.daemon('index-dump', self.home, number) != before:
                raise Broken('corrupt', 'a rebuilt index differs')
        self.unlogged()

    def count(self):
        """The cache directory counts what is there."""
        before = self.good('--print-stats')
        self.counted()
        self.good('--fsck')
        after = self.good('--print-stats')
        if after != before:
            raise Broken('corrupt', 'counts differ:\n%s%s' % (before, after))

    def counted(self):
        """A block's count is how many others in the cache directory name it.
        """
        path = os.path.join(self.cache, 'directory')
        if not os.path.exists(path):
            return
        with contextlib.closing(sqlite3.connect(path)) as db:
            if not db.execute('SELECT 1 FROM sqlite_master WHERE name = '
                              '"archives"').fetchone():
                return              # it was killed while it made the tables
            rows = db.execute('SELECT name, count, kids FROM blocks'
                              ).fetchall()
            wanted = collections.Counter(record for record, in db.execute(
                'SELECT record FROM archives'))
        for _, _, kids in rows:
            wanted.update({kid[1] for kid in
                           tarsnap.KID.iter_unpack(kids or b'')})
        wrong = [name for name, count, _ in rows
                 if count != wanted.pop(name, 0)]
        if wrong or wanted:
            raise Broken('corrupt', '%d counts are wrong, %d blocks missing'
                         % (len(wrong), len(wanted)))

    def run(self, going):
        """Kills and checks, while going() says so."""
        self.mine.set(logging=1)
        rounds = 0
        try:
            while going():
                for _ in range(self.dice.randrange(4, 12)):
                    self.hurt()
                rounds += 1
                self.check(whole=rounds % 15 == 0)
            self.check(whole=True)
        except (Broken, AssertionError):
            self.kept = tempfile.mkdtemp(prefix='crash-')
            shutil.copytree(self.world.root, os.path.join(
                self.kept, 'world'), symlinks=True)
            raise
        finally:
            self.end()


##############################################################################
# Parts
##############################################################################


def part_dir(dice, report, going):
    story = Story('dir', dice, report)
    guarded(story, report, lambda: story.run(going))


def part_tls(dice, report, going):
    story = Story('tls', dice, report)
    guarded(story, report, lambda: story.run(going))


def part_s3(dice, report, going):
    import s3peers
    clean = os.environ.pop('LD_PRELOAD')
    with s3peers.OpenMoto() as peer:
        os.environ.update(peer.environment(), LD_PRELOAD=clean)
        tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')
        story = Story('tls', dice, report, ('--store', 's3://backup/crash'),
                      peer.environment())
        guarded(story, report, lambda: story.run(going))


def guarded(story, report, work):
    """Do the work; a promise broken is counted, and told."""
    try:
        work()
    except (Broken, AssertionError) as e:
        kind = getattr(e, 'kind', 'corrupt')
        report[kind] += 1
        print('%s: %s\n%s\nsee %s' % (kind, e, '\n'.join(
            '    ' + line for line in story.past), story.kept), flush=True)


PARTS = {'dir': part_dir, 'tls': part_tls, 's3': part_s3}


##############################################################################
# Main
##############################################################################


def quiet():
    """This process is not one of those that are hurt, and if it is ended it
    ends what it has started.
    """
    faults.mute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def main():
    parser = argparse.ArgumentParser(
        description='Kills, power cuts and failing calls, by count.')
    parser.add_argument('--seed', type=int, metavar='N',
                        default=random.SystemRandom().getrandbits(32))
    parser.add_argument('--seconds', type=float, default=600, metavar='N',
                        help='for all parts together (default 600)')
    parser.add_argument('--count', type=int, default=10 ** 9, metavar='N',
                        help='of kills, cuts and faults of each part')
    parser.add_argument('parts', nargs='*', metavar='PART',
                        help=' '.join(PARTS))
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if 'FAULTS_STATE' not in os.environ:
        faults.preload([sys.executable, *sys.argv, '--seed', str(args.seed)])
    print('SEED=%d' % args.seed, flush=True)
    quiet()
    total = Report()
    with mock.patch.object(lab, 'no_fsync', contextlib.nullcontext), \
            mock.patch.object(tarsnap, 'WAITS', SHORT_WAITS), \
            mock.patch.object(tarsnap, 'RACY', 0):
        for part in parts:
            report = Report()
            end = time.monotonic() + args.seconds / len(parts)

            def going(report=report, end=end):
                return time.monotonic() < end and (
                    report['kills'] + report['power cuts']
                    + report['faults']) < args.count

            PARTS[part](random.Random('%s-%d' % (part, args.seed)), report,
                        going)
            print('%s: %s' % (part, report), flush=True)
            total.add(report)
    shutil.rmtree(os.path.dirname(os.environ['FAULTS_STATE']), True)
    print('%d named steps were met, %d were aimed at and not met%s' % (
        len(total.steps), len(set(total.tried) - set(total.steps)),
        ''.join('\n    %s: %s, %s "%s"' % (*step[:2], WAYS[step[3]], step[2])
                for step in sorted(set(total.tried) - set(total.steps)))))
    print(total)
    return 1 if total['corrupt'] or total['lost committed'] else 0


if __name__ == '__main__':
    sys.exit(main())
