# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The miner: which lines are of one kind, and that a kind keeps its name."""

import os
import random
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, os.path.join(ROOT, 'bench')]

import cron         # noqa: E402
import cronmails    # noqa: E402
import cronwatch    # noqa: E402


def kinds(*lines):
    """The key of each line, when all are known."""
    miner = cronwatch.Miner()
    keys = [miner.add(line)[0] for line in lines]
    return [miner.same(key) for key in keys]


class Kinds(unittest.TestCase):

    def one(self, *lines):
        self.assertEqual(len(set(kinds(*lines))), 1, lines)

    def apart(self, *lines):
        self.assertEqual(len(set(kinds(*lines))), len(lines), lines)

    def test_values_by_their_looks_do_not_tell_lines_apart(self):
        self.one('took 3 seconds', 'took 4.5 sec', 'took 12 ms', 'took 1h')
        self.one('1190 bytes (1.16 KB) sent', '0 bytes sent', '3.1 MB sent')
        self.one('at Fri Jun 17 07:07:00 2005', 'at 2024-03-01T01:02:03Z',
                 'at 17.06.2005 07:07', 'at 17/Jun/2005 07:07:00 +0200')
        self.one('from 192.0.2.1', 'from 192.0.2.1:25', 'from 2001:db8::1',
                 'from 2001:db8:0:0:1:2:3:4', 'from 00:11:43:e3:ba:c5',
                 'from mail.example.org', 'from www.example.org:443',
                 'from d211-116-254-214.rev.example.net')
        self.one('id 0x7fed806e', 'id 4c29e0a1',
                 'id b9000564-fe1a-409b-b8cc-1e88b294cd1d',
                 'id ' + '5f' * 32, 'id 1445144423722_0020_m_000001_0')
        self.one('read /etc/passwd', 'read /', 'read C:\\Windows\\x.dll',
                 'read /srv/a?b=c&d=e')
        self.one('full 97%', 'full 3.5 %')
        self.one('wrote https://example.org/a', 'wrote http://127.0.0.1:80/')
        self.one('mail to anna@example.org', 'mail to b.c+d@mx.example.com')
        self.one('version 1.2.3', 'version 1.2.3-4+deb12u1', 'version v2.0.1')

    def test_names_with_digits_are_one_once_both_sides_vary(self):
        self.one('block rdd_1_2 stored', 'block broadcast_3 stored',
                 'block rdd_4_5 stored', 'block broadcast_8 stored')
        self.apart('link up on eth0', 'link up on wlan0')
        self.one('link up on eth0', 'link up on eth1')

    def test_few_words_are_events_and_many_are_values(self):
        self.apart(*('VM %s (Lifecycle Event)' % word for word in
                     ('Started', 'Paused', 'Resumed', 'Stopped')))
        self.one(*('Setting up package %s now' % word for word in
                   ('curl', 'nginx', 'sudo', 'bash', 'zsh', 'git')))
        self.apart('x overlap:true', 'x overlap:false')
        self.apart('jobs found: PASSED', 'jobs found: FAILED')
        self.apart('array State : clean', 'array State : clean, degraded')

    def test_a_masked_place_takes_masked_values_only(self):
        self.apart('rows read: 17', 'rows read: none yet')
        self.one('handle = 17', 'handle = null')

    def test_what_may_be_empty_does_not_shift_the_rest(self):
        self.one('connection from 192.0.2.1 (a.example.org) at 10:11:12',
                 'connection from 192.0.2.1 () at 10:11:12')
        self.one('ruser= rhost=192.0.2.1 x', 'ruser= rhost= x')
        self.one('Invalid user  from 192.0.2.1',
                 'Invalid user anna from 192.0.2.1')

    def test_any_line_has_a_kind(self):
        rng = random.Random(4)
        miner = cronwatch.Miner()
        for line in ['', ' ', '\t', '=', '()', ')(', '"', '<*>', '<**>',
                     '\0\x1b\ufffd', 'a' * 100000, '=' * 5000, '(' * 5000,
                     '1.' * 4000, 'a.' * 4000, ':' * 3000, 'fe:' * 3000] + [
                ''.join(chr(rng.randrange(32, 0x250)) for _ in range(60))
                for _ in range(300)]:
            key, values = miner.add(line)
            self.assertEqual(miner.find(line)[0], miner.same(key))
            self.assertIsInstance(miner.template(key), str)
            for slot, value in values.items():
                self.assertIsInstance(value, (float, str), slot)


class Values(unittest.TestCase):

    def values(self, line):
        return cronwatch.Miner().add(line)[1]

    def test_numbers_in_their_units(self):
        self.assertEqual(self.values('read 1,234 rows in 1:02:03'),
                         {'n1': 1234., 'd4': 3723.})
        self.assertEqual(self.values('x 2 kB, 3 MiB, 17%, -4.5, 250 ms'),
                         {'b1': 2000., 'b3': 3 * 2. ** 20, 'c5': 17.,
                          'n7': -4.5, 'd9': .25})
        self.assertEqual(self.values('took 2 min 3.5 sec'), {'d1': 123.5})

    def test_texts_that_say_something(self):
        self.assertEqual(
            self.values('copied /srv/a to nas2 at 10.0.0.7'),
            {'p1': '/srv/a', 'e3': 'nas2', 'a5': '10.0.0.7'})

    def test_a_slot_stays_when_a_word_is_learned(self):
        miner = cronwatch.Miner()
        for word in ('curl', 'nginx', 'sudo', 'bash', 'zsh', 'git'):
            key, values = miner.add('package %s has 12 files' % word)
            self.assertEqual(values['n3'], 12.)
        self.assertEqual(values['w1'], 'git')
        self.assertEqual(miner.template(key), 'package <*> has <*> files')


class Names(unittest.TestCase):

    def lines(self):
        made = cronmails.corpus('test', jobs=12, days=12, learning=12)
        return [text for mail in made.mails for text in mail.texts][:3000]

    def test_a_restart_at_any_line_changes_nothing(self):
        lines = self.lines()
        whole, broken = cronwatch.Miner(), cronwatch.Miner()
        for number, line in enumerate(lines):
            if number % 97 == 0:
                broken = cronwatch.Miner(broken.dumps())
            self.assertEqual(whole.add(line), broken.add(line), line)
        self.assertEqual(whole.merged, broken.merged)
        self.assertEqual(whole.dumps(), broken.dumps())

    def test_the_older_key_stays_and_the_others_lead_to_it(self):
        words = ('curl', 'nginx', 'sudo', 'bash', 'zsh', 'git')
        miner = cronwatch.Miner()
        keys = [miner.add('Setting up package %s now' % word)[0]
                for word in words]
        self.assertEqual(keys[-1], keys[0])
        self.assertEqual({miner.same(key) for key in keys}, {keys[0]})
        self.assertEqual(set(miner.merged.values()), {keys[0]})

    def test_what_was_remembered_of_the_others_follows(self):
        words = ('curl', 'nginx', 'sudo', 'bash', 'zsh', 'git')
        miner, memory = cronwatch.Miner(), cronwatch.Memory()
        for run, word in enumerate(words[:4]):
            key, _ = miner.add('Setting up package %s now' % word)
            for n in (run, 7):
                memory.kind(key)['n'].append(n)
                memory.kind(key)['c'].append(run + 1)
                memory.kind(key)['p'].append(0)
            memory.values[key + '.n3'] = [[run], [float(run)]]
            memory.texts[key + '.p4'] = {word: run}
        for word in words[4:]:
            key, _ = miner.add('Setting up package %s now' % word)
        memory.follow(miner)
        self.assertEqual(list(memory.kinds), [key])
        self.assertEqual(memory.kinds[key]['n'], [0, 1, 2, 3, 7])
        self.assertEqual(memory.kinds[key]['c'], [1, 2, 3, 4, 10])
        self.assertEqual(memory.values, {
            key + '.n3': [[0, 1, 2, 3], [0., 1., 2., 3.]]})
        self.assertEqual(memory.texts, {key + '.p4': {
            word: run for run, word in enumerate(words[:4])}})

    def test_times_are_told_apart_from_values(self):
        miner = cronwatch.Miner()
        _, values = miner.add('at Mon Jan  5 10:11:12 2026 and 2026-01-05')
        self.assertEqual(values, {})
        self.assertEqual(miner.times,
                         ['Mon Jan  5 10:11:12 2026', '2026-01-05'])

    def test_keys_are_never_given_twice(self):
        miner, told = cronwatch.Miner(), {}
        for line in self.lines():
            key, _ = miner.add(line)
            told.setdefault(key, miner.template(key))
        self.assertFalse(set(miner.kinds) & set(miner.merged))
        for key, template in told.items():
            if key not in miner.merged:
                self.assertEqual(len(miner.template(key).split()),
                                 len(template.split()))

    def test_endless_new_lines_do_not_grow_without_end(self):
        miner, rng = cronwatch.Miner(), random.Random(5)
        for _ in range(cronwatch.KINDS_MOST + 300):
            miner.add(' '.join(rng.choice('abcdefghijklmnop') * rng.randrange(
                1, 5) for _ in range(rng.randrange(1, 9))))
        self.assertLessEqual(len(miner.kinds), cronwatch.KINDS_MOST)
        self.assertEqual(miner.template(miner.add('qqq rrr sss ttt')[0]),
                         '<*>')

    def test_generated_lines_are_grouped_by_their_formats(self):
        scores = [cron.grouping(labels, cron.mine(lines))
                  for _, lines, labels in cron.made_lines(['test'], 3)]
        self.assertGreater(sum(f1 for _, f1 in scores) / len(scores), .8)


if __name__ == '__main__':
    unittest.main()
