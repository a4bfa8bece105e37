# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What is raised, once and with its reason, and what is not.

A job's mail is made from a seed; the numbers in it wander as those of real
jobs do.  Each test changes one thing in one mail.
"""

import os
import random
import sys
import tempfile
import time
import unittest
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cronwatch                                            # noqa: E402

DAY = 86400
START = 1704164400              # a Tuesday, 03:00 UTC


class Job:
    """A nightly backup and what cronwatch thinks of it, in memory."""

    def __init__(self, days=30, every=DAY, seed=1):
        self.rng = random.Random(seed)
        self.watch = cronwatch.Watch(':memory:')
        self.at, self.every, self.day = START, every, 0
        self.raised = []
        for _ in range(days):
            self.raised += self.run()

    def lines(self):
        """The mail of today, as {part: line}."""
        files = self.rng.gauss(1200, 30)
        self.day += 1
        return {
            'start': 'Backup of /home started',
            'files': 'Number of files: %d' % files,
            'new': 'Files changed: %d' % self.rng.randrange(20, 60),
            'size': 'Total size: %.1f MB' % (files * 4.1),
            'disk': '/dev/sda1 %d%% used' % (40 + self.day // 4),
            'errors': '0 errors',
            'end': 'Backup finished',
        }

    def run(self, change=None, later=0, status=None, seconds=None, text=None):
        """One more mail; the findings."""
        self.at += self.every + later
        at = self.at + self.rng.randrange(60)
        self.at -= later
        lines = self.lines()
        lines.update(change or {})
        text = '\n'.join(line for line in lines.values()
                         if line is not None) if text is None else text
        found, count = cronwatch.text_lines(text)
        return self.watch.take(cronwatch.Run(
            'k', 'backup', at, found, count, len(text), status, seconds))


class Judged(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        os.environ['TZ'] = 'UTC'
        time.tzset()

    def one(self, findings, kind, *words):
        self.assertEqual([one.kind for one in findings], [kind],
                         [one.reason for one in findings])
        for word in words:
            self.assertIn(word, findings[0].reason)
        return findings[0]


class Found(Judged):

    def setUp(self):
        self.job = Job()
        self.assertEqual(self.job.raised, [])

    def test_nothing_while_all_is_as_usual(self):
        for _ in range(60):
            self.assertEqual(self.job.run(), [])

    def test_a_new_line_with_a_bad_word(self):
        found = self.one(self.job.run({'more': 'rsync: permission denied'}),
                         'new line', 'denied', 'rsync: permission denied')
        self.assertEqual(found.lines, [[8, 'rsync: permission denied']])

    def test_a_grave_one_is_critical(self):
        found = self.job.run({'more': 'write: no space left on device'})
        self.assertEqual(found[0].severity, cronwatch.CRITICAL)

    def test_a_new_line_without_one(self):
        self.one(self.job.run({'more': 'using the other tape'}), 'new line')

    def test_no_errors_are_no_error(self):
        self.assertEqual(self.job.run({'errors': '0 errors'}), [])
        words = cronwatch.Words()
        for line, weight in (('errors: 0', 0), ('no errors found', 0),
                             ('Failed:   0', 0), ('5 errors', 2),
                             ('10 errors', 2), ('/var/log/error.log', 0),
                             ('non-fatal', 0), ('fatal: x', 3),
                             ('fatal: no space left on device', 3),
                             ('Errors: no', 0), ('error: no such file', 2)):
            self.assertEqual(words.found(line)[0], weight, line)

    def test_none_became_some(self):
        self.one(self.job.run({'errors': '7 errors'}), 'value',
                 '7, usually 0')

    def test_a_line_is_missing(self):
        self.one(self.job.run({'end': None}), 'missing line',
                 '"Backup finished" is missing', 'last 30')

    def test_a_number_too_small(self):
        self.one(self.job.run({'files': 'Number of files: 12'}), 'value',
                 '12, usually 1')

    def test_a_number_too_large(self):
        self.one(self.job.run({'size': 'Total size: 90000.0 MB'}), 'value')

    def test_a_fraction_may_be_none(self):
        for i in range(20):
            self.job.run({'more': 'load 0.%02d' % (3 + 2 * (7 * i % 20))})
        self.assertEqual(self.job.run({'more': 'load 0.00'}), [])
        self.one(self.job.run({'more': 'load 9.00'}), 'value')

    def test_a_line_too_often(self):
        for _ in range(15):
            self.job.run({'more': 'vanished: file 1\nvanished: file 2'})
        self.one(self.job.run({'more': '\n'.join(
            'vanished: file %d' % i for i in range(40))}),
                 'count', '40 times')

    def test_empty(self):
        self.one(self.job.run(text=''), 'length', 'empty')

    def test_ten_times_as_long(self):
        self.one(self.job.run({'more': '\n'.join(
            'object %d' % i for i in range(100))}), 'length', '107 lines')

    def test_another_order(self):
        self.one(self.job.run({'start': 'Backup finished',
                               'end': 'Backup of /home started'}),
                 'order', 'other way round')

    def test_another_hour(self):
        self.one(self.job.run(later=5 * 3600), 'time', '08:0')

    def test_twice_in_a_day(self):
        self.one(self.job.run(later=-19 * 3600), 'time')

    def test_it_did_not_come(self):
        last = self.job.at
        self.assertEqual(self.job.watch.check(last + 1.05 * DAY), [])
        self.one(self.job.watch.check(last + 1.3 * DAY), 'absent', 'no mail')
        self.assertEqual(self.job.watch.check(last + 2 * DAY), [])
        self.job.at += DAY
        self.assertEqual(self.job.run(), [])
        found = cronwatch.findings_since(self.job.watch.state, 0)
        self.assertEqual([one.ended is None for one in found], [False])

    def test_exit_status(self):
        job = Job(0)
        for _ in range(10):
            self.assertEqual(job.run(status=0), [])
        found = self.one(job.run(status=3), 'status', 'exit status 3')
        self.assertEqual(found.severity, cronwatch.CRITICAL)

    def test_duration(self):
        job = Job(0)
        for i in range(20):
            self.assertEqual(job.run(seconds=300 + i), [])
        self.one(job.run(seconds=4000), 'duration', '67 minutes')

    def test_the_last_mail_again(self):
        text = '\n'.join(self.job.lines().values())
        self.assertEqual(self.job.run(text=text), [])
        self.one(self.job.run(text=text), 'value', 'last mail')

    def test_a_disk_that_fills(self):
        job, found = Job(0), []
        for i in range(60):         # what grows slowly is as usual
            self.assertEqual(job.run(
                {'disk': '/dev/sda1 %d%% used' % (30 + i)}), [])
        for i in range(90, 99):
            found += job.run({'disk': '/dev/sda1 %d%% used' % i})
        self.one(found[:1], 'value', 'full in about')
        self.assertLess(len(found), 3)      # once more when it is urgent

    def test_numbers_that_drift_away(self):
        found = []
        for i in range(9):
            found += self.job.run({'files': 'Number of files: %d' % (
                1200 * 1.25 ** i)})
        self.one(found, 'value')

    def test_a_word_instead_of_another(self):
        for _ in range(20):
            self.job.run({'more': 'status="green" nodes=3'})
        self.assertEqual(len(self.job.run(
            {'more': 'status="red" nodes=3'})), 1)


class Life(Judged):
    """What becomes of findings."""

    def test_a_job_that_learns_says_so(self):
        job = Job(4)
        self.assertIn('learning', '\n'.join(
            cronwatch.list_text(job.watch.state)))
        for _ in range(8):
            job.run()
        self.assertNotIn('learning', '\n'.join(
            cronwatch.list_text(job.watch.state)))

    def test_a_first_mail_may_be_the_alarm(self):
        job = Job(0)
        self.one(job.run(text='/bin/sh: 1: backup: not found'), 'new line',
                 'first mail', 'not found')

    def test_one_alarm_for_one_cause_and_recovery(self):
        job = Job()
        bad = {'more': 'rsync: connection refused', 'end': None}
        found = job.run(bad)
        self.assertEqual(len(found), 1)
        self.assertEqual(len(found[0].also), 1)
        for _ in range(3):
            self.assertEqual(job.run(bad), [])
        self.assertIsNone(job.watch.state.finding(found[0].id).ended)
        self.assertEqual(job.run(), [])
        self.assertIsNotNone(job.watch.state.finding(found[0].id).ended)
        self.assertEqual(len(job.run(bad)), 1)      # and again

    def test_ok_is_for_good(self):
        job = Job()
        bad = {'more': 'rsync: connection refused', 'end': None}
        job.watch.ok(job.run(bad)[0].id)
        for _ in range(5):
            self.assertEqual(job.run(bad), [])
            self.assertEqual(job.run(), [])

    def test_ok_to_a_number(self):
        job = Job()
        found = job.run({'files': 'Number of files: 20000'})
        job.run()
        job.watch.ok(found[0].id)
        self.assertEqual(job.run({'files': 'Number of files: 21000'}), [])
        self.assertEqual(len(job.run({'files': 'Number of files: 1'})), 1)

    def test_bad_is_never_learned(self):
        job = Job()
        job.watch.bad(job.run({'more': 'using the other tape'})[0].id)
        for _ in range(8):
            job.run()
            self.assertEqual(len(job.run({'more': 'using the other tape'})),
                             1)

    def test_a_changed_job_is_learned_without_a_storm(self):
        job = Job(40)
        new = {'start': 'backup2 begins: /home', 'end': None,
               'files': 'entries: 17', 'more': 'volume v2 closed'}
        found = [one for _ in range(25) for one in job.run(new)]
        self.assertLessEqual(len(found), 2)
        self.assertIsNotNone(job.watch.state.finding(found[0].id).ended)
        self.assertEqual(len(job.run({'more': None, 'end': None,
                                      'files': 'entries: 17'})), 1)

    def test_what_was_forgotten_is_new(self):
        job = Job()
        found = job.run({'more': 'using the other tape'})
        self.assertEqual(len(found), 1)
        self.assertEqual(job.run(), [])
        self.assertEqual(job.run({'more': 'using the other tape'}), [])
        for _ in range(430):
            job.run()
        self.assertEqual(len(job.run({'more': 'using the other tape'})), 1)

    def test_a_reworded_line_is_no_news(self):
        job = Job()
        self.assertEqual(job.run({'start': 'Backup of /home started now'}),
                         [])

    def test_many_that_did_not_come_are_one(self):
        job = Job(0)
        for day in range(20):
            for name in 'abcdef':
                job.watch.take(cronwatch.Run(
                    name, name, START + day * DAY, [(1, 'well')], 1, 5))
        found = job.watch.check(START + 20.5 * DAY)
        self.one(found, 'absent', '6 jobs')
        self.assertEqual(len(found[0].lines), 6)

    def test_state_stays_small(self):
        job = Job(0, every=600)
        for i in range(300):
            job.run({'more': 'session %x of user%d: word%d' % (
                i, i % 7, job.rng.randrange(10 ** 6))})
        row = job.watch.state.db.execute('SELECT * FROM job').fetchone()
        self.assertLess(len(row['memory']) + len(row['miner']), 200000)

    def test_mails_of_anybody_do_not_fill_the_state(self):
        """What came once is forgotten when there is much of it; what comes
        again is not.
        """
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        watch = cronwatch.Watch(os.path.join(base.name, 'state.db'))
        self.addCleanup(watch.state.close)
        letter = 'From: a@%s.example\nSubject: %s\n\nhello\n'

        def names():
            return {name for name, in watch.state.db.execute(
                'SELECT name FROM job')}

        with mock.patch.object(cronwatch, 'SELDOM_MOST', 20):
            for i in range(60):
                watch.deliver((letter % ('x' * (i + 1), 'spam')).encode(),
                              1e9 + 3600 * i)
                if i < 5:
                    watch.deliver((letter % ('host', 'report')).encode(),
                                  1e9 + 3600 * i + 60)
        self.assertEqual(names(), {'a@host.example: report'} | {
            'a@%s.example: spam' % ('x' * i) for i in range(40, 61)})
        self.assertEqual(watch.state.db.execute(
            'SELECT count(*) FROM mail WHERE job NOT IN (SELECT id FROM job)'
            ).fetchone()[0], 0)

    def test_bad_is_heard_in_a_reply(self):
        job = Job()
        finding = job.run({'more': 'rsync: connection refused'})[0]
        reply = ('From: me\nSubject: Re: x\nIn-Reply-To: <cronwatch.1.ab.'
                 '%d-%s@h>\n\nOK, this is fine.\n> old\n')
        wrong = reply % (finding.id, '0' * 16)
        self.assertEqual(job.watch.deliver(wrong.encode(), job.at), [])
        self.assertIsNone(job.watch.state.finding(finding.id).ended)
        for odd in ('9' * 30 + '-' + '0' * 16, '%d-%s' % (
                finding.id, finding.token)):
            raw = ('In-Reply-To: <cronwatch.1.ab.%s@h>\n\n\x07\n' % odd)
            job.watch.deliver(raw.encode(), job.at)     # is judged
        right = reply % (finding.id, finding.token)
        self.assertEqual(job.watch.deliver(right.encode(), job.at), [])
        self.assertIsNotNone(job.watch.state.finding(finding.id).ended)
        self.assertEqual(job.run({'more': 'rsync: connection refused'}), [])


if __name__ == '__main__':
    unittest.main()
