#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Runs the tests: each module in a process of its own, some at a time.

usage: tests/run.py [-j N] [-t SECONDS] [-s N] [-p PATTERN] [-v] [MODULE ...]

One more than there are processors run at once, as a quarter of the time is
waiting.  A module's output is kept together and shown when it fails (always
with -v).  One that takes more than SECONDS is killed, by the number of the
process that was started for it.  At the end: the reason of each skip, the
slowest tests, and one line `N passed, N failed, N skipped`.  Exit status 1 if
a test failed, if none ran, or, where CI is set in the environment, if one was
skipped.  `python3 -m unittest discover -s tests` runs the same tests.

Where CI is set, up to AGAIN tests that failed are run once more, alone, and
those that pass then are named as unsteady: what they printed stays in sight,
and no change is held up by a machine that was too busy for a moment.

If TALLY is set in the environment, the three numbers are appended to the file
it names.
"""

import argparse
import concurrent.futures
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
RUNNING = set()                 # processes of modules, each a group
AGAIN = 3                       # more failures than that are no accident
# Those that take long come first, or the last one would run alone.
FIRST = ['test_' + name for name in (
    'e2e_interrupt', 'e2e_hosts', 'e2e_badinput', 'e2e_wrappers',
    'cache_files', 'bench', 's3_server', 'e2e_ssh', 'recrypt', 'silent_loss',
    's3_store', 'keygen', 'server_hostile', 'dedup', 'cli_startup',
    'e2e_embedded', 'e2e_network')]


class Result(unittest.TextTestResult):
    """Remembers seconds, skips and failures by test name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = {}       # test -> seconds
        self.begun = 0.0        # of the running test
        self.passed = 0
        self.bad = set()        # tests that failed, however often

    def startTest(self, test):
        self.begun = time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        self.seconds[test.id()] = time.monotonic() - self.begun
        super().stopTest(test)

    def addSuccess(self, test):
        self.passed += 1
        super().addSuccess(test)

    def addExpectedFailure(self, test, err):
        self.passed += 1
        super().addExpectedFailure(test, err)

    def addFailure(self, test, err):
        self.bad.add(test.id())
        super().addFailure(test, err)

    def addError(self, test, err):
        self.bad.add(test.id())
        super().addError(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.bad.add(test.id())
        super().addSubTest(test, subtest, err)

    def addUnexpectedSuccess(self, test):
        self.bad.add(test.id())
        super().addUnexpectedSuccess(test)


def child(name, report):
    """Run a module or a test of one; its figures go to file `report`."""
    sys.path[:0] = [TESTS, ROOT]
    suite = unittest.defaultTestLoader.loadTestsFromName(name)
    result = unittest.TextTestRunner(
        stream=sys.stdout, verbosity=2, resultclass=Result).run(suite)
    with open(report, 'w') as file:
        json.dump({
            'passed': result.passed,
            'failed': sorted(result.bad),
            'skipped': [(test.id(), why) for test, why in result.skipped],
            'seconds': result.seconds,
            'cpu': sum(os.times()[:4]),     # with all that it waited for
        }, file)


def run(name, limit):
    """Run it in a child; (figures, its output, seconds it took)."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='tests-') as temp:
        report = os.path.join(temp, 'report')
        with open(os.path.join(temp, 'output'), 'w+b') as output:
            process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), '--child', report,
                 name], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True)
            note = ''
            RUNNING.add(process.pid)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                note = 'killed after %d seconds\n' % limit
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            RUNNING.discard(process.pid)
            output.seek(0)
            text = output.read().decode('utf-8', 'replace') + note
        try:
            with open(report) as file:
                figures = json.load(file)
        except (OSError, ValueError):
            figures = {'passed': 0, 'failed': [name], 'skipped': [],
                       'seconds': {}, 'cpu': 0.0}
            text += 'the module did not run to its end (exit status %d)\n' \
                % process.returncode
    return figures, text, time.monotonic() - begun


def stop(number, frame):
    """A signal to end: the modules end too."""
    for pid in list(RUNNING):
        os.killpg(pid, signal.SIGKILL)
    os._exit(128 + number)


def modules(pattern):
    """Names of the test modules that match: FIRST, then the largest file."""
    names = [name for name in os.listdir(TESTS)
             if fnmatch.fnmatch(name, pattern)]
    names.sort(key=lambda name: (
        -os.path.getsize(os.path.join(TESTS, name)), name))
    names = [name[:-len('.py')] for name in names]
    return sorted(names, key=lambda name: (
        FIRST.index(name) if name in FIRST else len(FIRST)))


def run_all(names, jobs, limit, verbose):
    """Run them, printing as they end; the sum of their figures."""
    total = {'passed': 0, 'failed': [], 'skipped': [], 'seconds': {},
             'cpu': 0.0}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, name, limit): name for name in names}
        for future in concurrent.futures.as_completed(running):
            figures, text, seconds = future.result()
            print('%-26s %6.1f s %6.1f cpu  %3d passed, %d failed, '
                  '%d skipped' % (
                      running[future], seconds, figures['cpu'],
                      figures['passed'], len(figures['failed']),
                      len(figures['skipped'])))
            if verbose or figures['failed']:
                print(text, end='' if text.endswith('\n') else '\n')
            sys.stdout.flush()
            for key in ('passed', 'failed', 'skipped', 'cpu'):
                total[key] += figures[key]
            total['seconds'].update(figures['seconds'])
    return total


def run_again(total, limit):
    """Run what failed once more, alone; what passes then is unsteady."""
    for name in list(total['failed']):
        figures, text, _ = run(name, limit)
        if figures['passed'] and not figures['failed']:
            print('unsteady: %s failed once, and passed alone' % name)
            total['failed'].remove(name)
            total['passed'] += figures['passed']
        else:
            print('failed again: %s' % name)
            print(text, end='' if text.endswith('\n') else '\n')


def main():
    if sys.argv[1:2] == ['--child']:
        child(sys.argv[3], sys.argv[2])
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    parser = argparse.ArgumentParser(description='Runs the tests.')
    jobs = (os.cpu_count() or 1) + 1
    parser.add_argument('-j', type=int, default=jobs, metavar='N',
                        help='modules at once (default here %d)' % jobs)
    parser.add_argument('-t', type=float, default=600, metavar='SECONDS',
                        help='most for one module (default 600)')
    parser.add_argument('-s', type=int, default=8, metavar='N',
                        help='show the N slowest tests (default 8)')
    parser.add_argument('-p', default='test*.py', metavar='PATTERN',
                        help='modules to run (default test*.py)')
    parser.add_argument('-v', action='store_true',
                        help='show the output of all modules')
    parser.add_argument('modules', nargs='*', metavar='MODULE')
    args = parser.parse_args()
    names = [os.path.basename(name)[:-3] if name.endswith('.py') else name
             for name in args.modules] or modules(args.p)
    begun = time.monotonic()
    total = run_all(names, args.j, args.t, args.v)
    if os.environ.get('CI') and len(total['failed']) <= AGAIN:
        run_again(total, args.t)
    for test, why in total['skipped']:
        print('skipped: %s: %s' % (test, why))
    slow = sorted(total['seconds'].items(), key=lambda item: -item[1])
    for test, seconds in slow[:args.s]:
        print('slow: %6.1f s  %s' % (seconds, test))
    print('Python %s, %d modules, %.0f seconds, %.0f of CPU' % (
        sys.version.split()[0], len(names), time.monotonic() - begun,
        total['cpu']))
    numbers = (total['passed'], len(total['failed']), len(total['skipped']))
    if os.environ.get('TALLY'):
        with open(os.environ['TALLY'], 'a') as file:
            file.write('%d %d %d\n' % numbers)
    if os.environ.get('CI') and numbers[2]:
        print('a skipped test is a failure where CI is set')
    if not sum(numbers):
        print('no test ran')
    print('%d passed, %d failed, %d skipped' % numbers)
    failed = numbers[1] or not numbers[0] or (os.environ.get('CI')
                                              and numbers[2])
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
