# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The made cron mails are what they say, and what is counted is right."""

import email
import email.policy
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, os.path.join(ROOT, 'bench')]

import cron         # noqa: E402
import cronmails    # noqa: E402


@functools.lru_cache(None)
def corpus():
    return cronmails.corpus('test', days=75, learning=30)


class Grouping(unittest.TestCase):
    """Against values worked out by hand."""

    def check(self, truth, found, accuracy, f1):
        got = cron.grouping(truth, found)
        self.assertAlmostEqual(got[0], accuracy)
        self.assertAlmostEqual(got[1], f1)

    def test_names_of_groups_do_not_matter(self):
        self.check('aabbc', 'xxyyz', 1, 1)

    def test_a_group_in_two_loses_all_its_lines(self):
        # Pairs: 3 true of a and 1 of b; found are 1 of a and 1 of b.
        self.check('aaabb', 'xxyzz', .4, 2 * 1 * .5 / 1.5)

    def test_two_groups_in_one_lose_both(self):
        # 2 true pairs, 6 found, both true ones among them.
        self.check('aabb', 'xxxx', 0, 2 * 1 / 3 / (4 / 3))

    def test_the_same_size_is_not_the_same_group(self):
        self.check('aabb', 'xyxy', 0, 0)

    def test_single_lines(self):
        self.check('abc', 'xyz', 1, 1)
        self.check('', '', 0, 1)


class Samples(unittest.TestCase):

    def test_a_structured_file_with_all_quirks(self):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, 'X'))
            path = os.path.join(folder, 'X', 'X_2k.log_structured.csv')
            with open(path, 'wb') as file:
                file.write(
                    b'\xef\xbb\xbfLineId,Content,EventId,EventTemplate\r\n'
                    b'1,"said ""no"", left",E1,x\r\n'
                    b'2,"two\nlines \xff\0",E2,"a, b"\r\n'
                    b'3,unlabelled,,\r\n4, padded ,E1,x\r\n')
            (name, lines, labels), = cron.samples(folder)
        self.assertEqual(name, 'X')
        self.assertEqual(lines, ['said "no", left', 'two\nlines \ufffd',
                                 ' padded '])
        self.assertEqual(labels, ['E1', 'E2', 'E1'])


class Corpus(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.made = corpus()

    def test_the_same_seed_gives_the_same_bytes(self):
        code = ('import sys, hashlib; sys.path.insert(0, %r)\n'
                'import cronmails\n'
                'made = cronmails.corpus("test", days=75, learning=30)\n'
                'print(hashlib.sha256(b"".join(\n'
                '    mail.raw for mail in made.mails)).hexdigest(), [(\n'
                '    fault.kind, fault.start, fault.end)\n'
                '    for fault in made.faults])' % os.path.join(ROOT,
                                                                'bench'))
        said = subprocess.run(
            [sys.executable, '-c', code], check=True, text=True,
            stdout=subprocess.PIPE, env=dict(os.environ, PYTHONHASHSEED='7')
        ).stdout.strip()
        self.assertEqual(said, '%s %s' % (hashlib.sha256(b''.join(
            mail.raw for mail in self.made.mails)).hexdigest(), [
                (fault.kind, fault.start, fault.end)
                for fault in self.made.faults]))
        other = cronmails.corpus('other', jobs=3, days=5, learning=5)
        mine = cronmails.corpus('test', jobs=3, days=5, learning=5)
        self.assertNotEqual(other.mails[0].raw, mine.mails[0].raw)

    def test_kinds_classes_and_senders_are_many(self):
        self.assertGreaterEqual(len(cronmails.KINDS), 40)
        self.assertGreaterEqual(len(cronmails.CLASSES), 15)
        self.assertGreaterEqual(
            len({fault.kind for fault in self.made.faults}), 15)
        self.assertLessEqual({'debian', 'freebsd', 'anacron', 'systemd'}, {
            kind.sender for kind in cronmails.KINDS.values()})

    def test_each_mail_says_its_lines(self):
        for mail in self.made.mails[::37]:
            job = self.made.jobs[mail.job]
            message = email.message_from_bytes(mail.raw,
                                               policy=email.policy.default)
            text = message.get_body(('plain', 'html')).get_content()
            for line in mail.texts[:9]:
                if job.kind.sender == 'html':
                    line = line.split('|')[0].replace('&', '&amp;')
                self.assertIn(line.rstrip(), text, job.kind.name)
            self.assertTrue(message['Subject'] and message['From'])

    def test_mails_come_in_order_and_faults_after_the_learning_time(self):
        times = [mail.time for mail in self.made.mails]
        self.assertEqual(times, sorted(times))
        learned = (cronmails.stamp_of(cronmails.EPOCH, 'UTC')
                   + 30 * cronmails.DAY)
        shown = {mail.fault.number for mail in self.made.mails if mail.fault}
        for fault in self.made.faults:
            self.assertGreater(fault.start, learned - cronmails.DAY)
            self.assertGreater(fault.end, fault.start)
            self.assertEqual(fault.number in shown, fault.kind != 'missing')

    def test_summer_time_moves_a_local_job(self):
        winter = cronmails.stamp_of(cronmails.datetime.datetime(
            2024, 3, 30, 4), 'CET')
        summer = cronmails.stamp_of(cronmails.datetime.datetime(
            2024, 4, 1, 4), 'CET')
        self.assertEqual(summer - winter, 47 * 3600)
        self.assertIn('+0200', cronmails.mail_date(summer, 'CET'))


class Counting(unittest.TestCase):

    def test_alarms_in_and_out_of_a_fault(self):
        made = cronmails.corpus('test', jobs=6, days=75, learning=30)
        score = cron.Score(made)
        fault = made.faults[0]
        score.alarm(fault.start + 1, fault.job.number, {'count'})
        score.alarm(fault.end + 1e7, fault.job.number, {'count'})
        score.alarm(score.begin + 1, fault.job.number)      # still learning
        result = score.figures()
        self.assertEqual((result['found'], result['false'],
                          result['alarms'], result['early']), (1, 1, 2, 1))
        self.assertEqual(result['precision'], .5)
        self.assertEqual(result['kinds'], {'count': [1, 2]})
        self.assertAlmostEqual(result['false a job and quarter'],
                               1 / 6 / 45 * 90)

    def test_the_rivals_see_what_they_say_they_see(self):
        made, recall = corpus(), {}
        for watcher in (cron.ExitCode(), cron.DeadMan(made.jobs),
                        cron.KnownLines()):
            classes = cron.watched(made, watcher).figures()['classes']
            recall[watcher.name] = {kind: part / whole for kind, (
                part, whole) in classes.items()}
        self.assertEqual(recall['exit code only']['exit only'], 1)
        self.assertEqual(recall['exit code only']['value high'], 0)
        self.assertGreater(recall["dead man's switch"]['missing'], .5)
        self.assertEqual(recall['known lines']['broken'], 1)

    def test_the_whole_bench_runs(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'out.json')
            done = subprocess.run(
                [sys.executable, os.path.join(ROOT, 'bench', 'cron.py'),
                 '--quick', '--no-drain', '--json', path, '--part', 'judge',
                 '--part', 'scale'],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertIn('known lines', done.stdout)
            self.assertGreater(os.path.getsize(path), 1000)


if __name__ == '__main__':
    unittest.main()
