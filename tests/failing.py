#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Every call fails once, in every way: one clear line, and nothing is lost.

usage: tests/failing.py [--seed N] [--seconds N] [--count N] [PART ...]

Of each command, the n-th call fails, for every n up to as many as it makes:

    client  calls on the cache directory, and on what is restored
    server  commands and an embedded server: calls on the server directory
    verbs   what the store is asked to do, before or after it is done
    net     what a client and its server send and receive
    served  calls of a server process, with a client
    s3      requests to a bucket, by a client with a server of its own

After each: the exit status is right, what is said is one line of reason and
no traceback, what was acknowledged before is still there, the command, given
once more, succeeds and has done what it says, the server scrubs clean and the
cache directory counts what is there.

Without --seconds and --count all is tried, which takes hours, or a part of
it, such as `client/create` or `client/create, no space`; with one of them a
share that the seed picks.  The last line is the report, as in crash.py.
"""

import argparse
import contextlib
import errno
import os
import random
import re
import shutil
import sys
import time
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import crash                                    # noqa: E402
import faults                                   # noqa: E402
import lab                                      # noqa: E402
import tarsnap                                  # noqa: E402
import tarsnapd                                 # noqa: E402
import world                                    # noqa: E402
from crash import Broken, Report, server_main   # noqa: E402
from faults import (                            # noqa: E402
    FAIL, FOREVER, HALF, LATE, NETWORK, READS, SHORT, WRITES)

# What a call comes to: (name, what, errno, classes of calls).
CALLS = (
    ('no space', FAIL, errno.ENOSPC, WRITES),
    ('no space for all of it', HALF, errno.ENOSPC, WRITES),
    ('no space from then on', FAIL | FOREVER, errno.ENOSPC, WRITES),
    ('over the quota', FAIL, errno.EDQUOT, WRITES),
    ('an error', FAIL, errno.EIO, WRITES | READS),
    ('an error, yet done', LATE, errno.EIO, WRITES),
    ('short', SHORT, 0, WRITES | READS),
)
SOCKETS = (
    ('reset', FAIL, errno.ECONNRESET, NETWORK),
    ('timeout', FAIL, errno.ETIMEDOUT, NETWORK),
    ('sent, yet reset', LATE, errno.ECONNRESET, NETWORK),
    ('short', SHORT, 0, NETWORK),
)
TOO_MUCH = 50                   # that goes wrong: something else does
VERBS = ('before', 'after', 'from then on')
WIRE = ('500', 'slow', '409', 'reset', 'lost', 'torn', 'hang')

# Lines that go with a reason.
AROUND = re.compile(
    r'tarsnap: (Error exit delayed from previous errors\.|%s|'
    r'The server has changed what it stores nevertheless\.)$'
    % '|'.join(tarsnap.FAILED.values()))
LINE = re.compile(r'tarsnapd?: \S.*$')
FILE_LINE = re.compile(r'\./.*: \S.*$')      # of a restore


class Op:
    """A command: its words, whose files it works on, what it is to do."""

    def __init__(self, name, words, effect=None, cache=True):
        self.name = name
        self.words = words      # of a Bench
        self.effect = effect    # (archive, True if it is there then) or None
        self.cache = cache


OPS = (
    Op('create', lambda b: ['-c', '-f', 'new', '--exclude', 'extra', '-C',
                            b.tree, '.'], ('new', True)),
    Op('checkpoint', lambda b: ['-c', '-f', 'big', '--checkpoint-bytes',
                                '1000000', '-C', b.tree, '.'], ('big', True)),
    Op('delete', lambda b: ['-d', '-f', 'a1'], ('a1', False)),
    Op('undelete', lambda b: ['--undelete', '-f', 'gone'], ('gone', True)),
    Op('restore', lambda b: ['-x', '-p', '-f', 'a2', '-C', b.fresh()],
       cache=False),
    Op('list', lambda b: ['--list-archives'], cache=False),
    Op('stats', lambda b: ['--print-stats']),
    Op('fsck', lambda b: ['--fsck']),
)
COMMANDS = (
    Op('clean', lambda b: ['clean', b.home, '--abandon']),
    Op('scrub', lambda b: ['scrub', b.home]),
    Op('rebuild', lambda b: ['rebuild', b.home]),
    Op('figures', lambda b: ['stats', b.home]),
    Op('quota', lambda b: ['machine', b.home, 'quota', b.number, '1G']),
    Op('account', lambda b: ['user', b.home, 'quota', 'somebody', '2G']),
)


##############################################################################
# Bench
##############################################################################


class Bench(crash.Story):
    """A store with archives in it, as it was, for each case anew."""

    def __init__(self, kind, dice, report, init=(), env=()):
        super().__init__(kind, dice, report, init, env)
        self.number = self.machine()
        self.out = None             # where something is restored to
        self.saved = None           # copies to begin a case with
        self.before = None          # what is listed then
        self.scrubs = True          # the server's files are in danger
        self.live = False           # or what one leaves is cleared away
        self.strict = False         # an exit status of 1 means: not done
        self.daemon('machine', self.home, 'delete-delay', self.number, '0')
        self.feed()
        for name in ('a1', 'gone', 'a2'):
            self.tree_change()
            self.models[name] = lab.snapshot(self.tree)
            self.good('-c', '-f', name, '-C', self.tree, '.')
        self.good('-d', '-f', 'gone')
        world.write(os.path.join(self.tree, 'extra'),
                    dice.randbytes(1100000))
        self.models['big'] = lab.snapshot(self.tree)
        self.models['new'] = {name: what for name, what in
                              self.models['big'].items() if name != b'extra'}
        self.mine.set()

    def user_add(self):
        self.world.tarsnapd('user', self.home, 'add', 'somebody',
                            give=b'correct horse battery\n')

    def save(self):
        """What there is now is what each case begins with."""
        self.saved = self.world.path('saved')
        for name, path in (('home', self.home), ('cache', self.cache)):
            shutil.copytree(path, os.path.join(self.saved, name),
                            symlinks=True)
        self.before = self.names()

    def back(self):
        """Begin a case."""
        if self.saved:
            for name, path in (('home', self.home), ('cache', self.cache)):
                shutil.rmtree(path)
                shutil.copytree(os.path.join(self.saved, name), path,
                                symlinks=True)
        if self.live:
            for name in self.names():
                if name.startswith(('new', 'big')):
                    self.good('-d', '-f', name)

    def fresh(self):
        """A directory to restore to."""
        self.out = self.world.path('out')
        shutil.rmtree(self.out, True)
        os.mkdir(self.out)
        return self.out

    def begin(self, op, patch=contextlib.nullcontext):
        """Start a command whose process `patch` has changed."""
        words = op.words(self)
        if op in COMMANDS:
            return self.launch(words, server_main, patch)
        return self.launch(self.argv(words, op.cache), None, patch)

    # One case.

    def trial(self, op, text, arm, hits, patch=contextlib.nullcontext):
        """Run `op` after arm(); False if hits() says that it did not come
        to what was armed.
        """
        self.back()
        self.past[:] = ['%s of %s:' % (text, op.name)]
        before = self.before or (self.names() if op.effect else set())
        arm()
        client = self.begin(op, patch)
        self.wait(client)
        hit = hits()
        self.mine.set()
        self.report['faults'] += hit
        if client.code:
            self.report['failed'] += 1
        self.said(op, client)
        self.judge(op, client.code, before)
        return hit

    def said(self, op, client):
        """One line of reason if it failed, and never a traceback."""
        out, err = client.texts()
        lines = err.splitlines()
        if 'Traceback' in out + err or any(
                not LINE.match(line) and not (
                    op.name == 'restore' and FILE_LINE.match(line))
                for line in lines):
            raise Broken('corrupt', 'it says: %s' % err)
        if client.code not in (0, 1, 2):
            raise Broken('corrupt', 'exit status %d: %s' % (
                client.code, err))
        reasons = [line for line in lines if not AROUND.match(line)]
        if client.code and not reasons:
            raise Broken('corrupt', 'no reason: %s' % err)
        if len(reasons) > 1 and op.name != 'restore':
            raise Broken('corrupt', '%d reasons: %s' % (len(reasons), err))

    def judge(self, op, code, before):
        """It has done what its status says; once more, it succeeds."""
        if op.effect:
            name, there = op.effect
            now = {one for one in self.names() if not one.endswith('.part')}
            before = {one for one in before if not one.endswith('.part')}
            done = (name in now) == there
            if code == 0 and not done:
                raise Broken('lost committed', 'not done: %s' % now)
            if code == 1 and done and self.strict:
                raise Broken('corrupt', 'done, and yet exit status 1')
            if now - {name} != before - {name}:
                raise Broken('lost committed', '%s, but then %s' % (
                    before, now))
            if not done:
                # What was sealed and not decided, the next run decides.
                self.good('--recover')
                if (name in self.names()) != there:
                    self.again(op)
            if there:
                self.compare(name)
        elif code or op.name == 'restore':
            if code == 0:
                self.restored()
            self.again(op)
        self.whole(op)

    def again(self, op):
        """The command once more, with nothing in its way."""
        if op.name == 'checkpoint' and 'big.part' in self.names():
            # It was made, and keeps the name.
            self.good('-d', '-f', 'big.part')
        client = self.begin(op)
        if self.wait(client):
            raise Broken('corrupt', 'once more: exit status %d: %s' % (
                client.code, client.texts()[1]))
        if op.name == 'restore':
            self.restored()

    def restored(self):
        found = lab.snapshot(self.out)
        found[b''] = self.models['a2'][b'']
        lines = lab.difference(self.models['a2'], found)
        if lines:
            raise Broken('corrupt', 'restored: %s' % lines[:5])

    def whole(self, op):
        """What was there before is there, in the server and here."""
        if self.dice.random() < 0.25:
            self.compare('a2')
        if self.scrubs and (op in COMMANDS or op.effect):
            self.good('scrub', self.home)
        if op.cache and op not in COMMANDS:
            self.good('--recover')
            self.counted()

    def good(self, *words, cache=True):
        """A command that nothing happens to; its stdout."""
        self.mine.set()
        client = self.start(*words, cache=cache)
        if self.wait(client):
            raise Broken('corrupt', '%r: %d %s' % (
                words, client.code, client.texts()[1]))
        return client.texts()[0]

    def died(self):
        """A server never dies of an error."""
        said = self.server.running.text()
        self.restart()
        raise Broken('corrupt', 'the server ended: %r' % said)


##############################################################################
# Parts
##############################################################################


class Turns:
    """Which cases are tried: all, or for so long or so many, by lot."""

    def __init__(self, dice, report, only='', seconds=None, count=None):
        self.only = only            # what the name of a kind begins with
        self.dice = dice
        self.report = report
        self.end = seconds and time.monotonic() + seconds
        self.count = count

    def go(self, bench, kinds, most=100000):
        """Call try(n) of each of `kinds`, {text: try}, for every n until it
        is False: there was no n-th.
        """
        kinds = {text: attempt for text, attempt in kinds.items()
                 if not self.only or text == self.only
                 or text.startswith(self.only + ', ')}
        if not (self.end or self.count):
            for text, attempt in kinds.items():
                for n in range(1, most):
                    if not self.attempt(bench, attempt, n):
                        break
                self.tell(text, n - 1)
            return
        lengths = {text: 40 for text in kinds}
        while kinds and (not self.end or time.monotonic() < self.end) and (
                not self.count or self.report['faults'] < self.count):
            text = self.dice.choice(sorted(kinds))
            n = self.dice.randrange(1, lengths[text] + 1)
            if self.attempt(bench, kinds[text], n):
                lengths[text] = max(lengths[text], 2 * n)
            elif n > 1:
                lengths[text] = n - 1
            else:
                del kinds[text]     # it makes no such calls

    def attempt(self, bench, attempt, n):
        """One case; what goes wrong is counted and told."""
        try:
            return attempt(n)
        except (Broken, AssertionError) as e:
            kind = getattr(e, 'kind', 'corrupt')
            self.report[kind] += 1
            if self.report[kind] > TOO_MUCH:
                raise
            print('%s: call %d: %s\n%s' % (kind, n, e, '\n'.join(
                '    ' + line for line in bench.past)), flush=True)
            return True

    @staticmethod
    def tell(text, count):
        print('    %s: %d' % (text, count), flush=True)


@contextlib.contextmanager
def bench_of(kind, dice, report, init=(), env=()):
    bench = Bench(kind, dice, report, init, env)
    try:
        yield bench
    finally:
        bench.end()


def calls_kinds(bench, ops, watch, kinds=CALLS, victim=None):
    """{text: try} of calls on directories, for Turns.go()."""
    found = {}
    for op in ops:
        for name, what, error, mask in kinds:
            def attempt(n, op=op, name=name, how=(what, error, mask)):
                def arm():
                    if watch:
                        bench.mine.watch(*watch(op))
                    who.set(n, *how)
                who = victim or bench.mine
                hits = []

                def hit():
                    hits.append(who.hits > 0)
                    who.set()
                    return hits[0]
                return bench.trial(op, 'call %d: %s,' % (n, name), arm, hit)
            found['%s, %s' % (op.name, name)] = attempt
    return found


def part_client(dice, report, turns):
    with bench_of('dir', dice, report) as bench:
        bench.save()
        bench.strict, bench.scrubs = True, False
        turns.go(bench, calls_kinds(bench, OPS, lambda op: [
            bench.world.path('out') if op.name == 'restore'
            else bench.cache]))


def part_server(dice, report, turns):
    with bench_of('dir', dice, report) as bench:
        bench.user_add()
        bench.save()
        turns.go(bench, calls_kinds(
            bench, OPS[:5] + COMMANDS, lambda op: [bench.home]))


def part_verbs(dice, report, turns):
    with bench_of('dir', dice, report) as bench:
        bench.user_add()
        bench.save()
        found = {}
        for op in OPS[:5] + COMMANDS:
            for how in VERBS:
                def attempt(n, op=op, how=how):
                    path = bench.world.path('verbs')
                    with open(path, 'w') as file:
                        file.write('0')
                    return bench.trial(
                        op, 'verb %d fails %s' % (n, how), lambda: None,
                        lambda: verbs_met(path),
                        lambda: verbs_fail(path, n, how))
                found['%s, %s' % (op.name, how)] = attempt
        turns.go(bench, found)


def verbs_met(path):
    with open(path) as file:
        return file.read() == '1'


@contextlib.contextmanager
def verbs_fail(path, n, how):
    """The n-th verb of any store fails, as when its answer is lost."""
    count = [0]

    def failing(verb):
        real = getattr(tarsnapd.FileStore, verb)

        def ask(store, key, *args):
            count[0] += 1
            due = count[0] == n or (how == 'from then on' and count[0] > n)
            if due:
                with open(path, 'w') as file:
                    file.write('1')
                if how == 'after':
                    real(store, key, *args)
                raise tarsnapd.StoreError(verb, key, 'timed out')
            return real(store, key, *args)
        return ask

    with contextlib.ExitStack() as stack:
        for verb in tarsnapd.STORE_VERBS:
            stack.enter_context(mock.patch.object(
                tarsnapd.FileStore, verb, failing(verb)))
        yield


SERVED = tuple(op for op in OPS if op.name in (
    'create', 'checkpoint', 'restore', 'list', 'stats', 'fsck'))


def part_net(dice, report, turns):
    with bench_of('tls', dice, report) as bench:
        bench.live = True
        found = calls_kinds(bench, SERVED, lambda op: [bench.cache], SOCKETS)
        for text, attempt in calls_kinds(bench, SERVED, None, SOCKETS,
                                         bench.theirs).items():
            found['server: ' + text] = attempt
        turns.go(bench, found)


def part_served(dice, report, turns):
    with bench_of('tls', dice, report) as bench:
        bench.live = True
        turns.go(bench, calls_kinds(bench, SERVED, None, CALLS,
                                    bench.theirs))


def part_s3(dice, report, turns):
    import s3peers
    clean = os.environ.pop('LD_PRELOAD')
    with s3peers.OpenMoto() as peer, contextlib.ExitStack() as stack:
        case = crash.Case()
        stack.callback(case.stack.close)
        wire = s3peers.Wire(case, peer)
        os.environ.update(peer.environment(wire.port), LD_PRELOAD=clean)
        stack.enter_context(mock.patch.dict(tarsnapd.S3_LIMIT, {
            'silence': 1, 'first delay': 0.01, 'first delay if slow': 0.01}))
        tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')
        with bench_of('dir', dice, report, ('--store', 's3://backup/x'),
                      peer.environment(wire.port)) as bench:
            bench.live = True
            found = {}
            for op in SERVED + COMMANDS[:3]:
                for how in WIRE:
                    def attempt(n, op=op, how=how):
                        return s3_case(bench, wire, op, n, how)
                    found['%s, %s' % (op.name, how)] = attempt
            turns.go(bench, found)


def s3_case(bench, wire, op, n, how):
    """The n-th request of a command comes to `how`."""
    first = []

    def arm():
        first.append(wire.count)
        wire.plan = lambda number, method, path: (
            how if number == first[0] + n else None)

    def hit():
        wire.plan = lambda *_: None
        return wire.count >= first[0] + n
    return bench.trial(op, 'request %d: %s,' % (n, how), arm, hit)


PARTS = {'client': part_client, 'server': part_server, 'verbs': part_verbs,
         'net': part_net, 'served': part_served, 's3': part_s3}


##############################################################################
# Main
##############################################################################


def main():
    parser = argparse.ArgumentParser(
        description='Every call fails once, in every way.')
    parser.add_argument('--seed', type=int, metavar='N',
                        default=random.SystemRandom().getrandbits(32))
    parser.add_argument('--seconds', type=float, metavar='N',
                        help='for all parts together, cases by lot')
    parser.add_argument('--count', type=int, metavar='N',
                        help='faults of each part, cases by lot')
    parser.add_argument('parts', nargs='*', metavar='PART',
                        help='%s, or one with /WHAT' % ' '.join(PARTS))
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if 'FAULTS_STATE' not in os.environ:
        faults.preload([sys.executable, *sys.argv, '--seed', str(args.seed)])
    print('SEED=%d' % args.seed, flush=True)
    crash.quiet()
    total = Report()
    with mock.patch.object(lab, 'no_fsync', contextlib.nullcontext), \
            mock.patch.object(tarsnap, 'WAITS', crash.SHORT_WAITS), \
            mock.patch.object(tarsnap, 'RACY', 0):
        for part in parts:
            report = Report()
            dice = random.Random('%s-%d' % (part, args.seed))
            name, _, only = part.partition('/')
            PARTS[name](dice, report, Turns(
                dice, report, only,
                args.seconds and args.seconds / len(parts), args.count))
            print('%s: %s' % (part, report), flush=True)
            total.add(report)
    shutil.rmtree(os.path.dirname(os.environ['FAULTS_STATE']), True)
    print(total)
    return 1 if total['corrupt'] or total['lost committed'] else 0


if __name__ == '__main__':
    sys.exit(main())
