# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--last-backup-age: how old the newest complete archive is, for monitors."""

import json
import re
import time
import unittest
from unittest import mock

import lab
import tarsnap
from lab import D, R, W

HOUR = 3600
OK, WARNING, CRITICAL, UNKNOWN = range(4)
WORDS = ('OK', 'WARNING', 'CRITICAL', 'UNKNOWN')


class Age(lab.LabTest):

    def setUp(self):
        super().setUp()
        self.write('f', b'x')
        self.sent = int(time.time()) - 60    # each a second later

    def made(self, name, hours, *args):
        """An archive that says it is so old, and is sent now."""
        self.sent += 1
        when, made = self.sent, time.time() - hours * HOUR
        with mock.patch.object(time, 'time', lambda: when):
            self.host.create(name, '--creationtime=%d' % made, *args)

    def age(self, status, *args, host=None, says=''):
        """What is said when the status must be this; the errors, too."""
        result = (host or self.host).run('--last-backup-age', *args)
        self.assertEqual(result.status, status, result)
        self.assertRegex(result.out, r'\Atarsnap %s - [^\n]+\n\Z'
                         % WORDS[status])
        self.assertIn(says, result.out)
        return result.err

    def test_limits(self):
        self.made('home-2026-11-23', 30)
        self.age(OK, says='home-2026-11-23, 1 d 6 h old|age=1080')
        for status, *words in (
                (OK, '--max-age', '31h'), (CRITICAL, '--max-age', '29h'),
                (OK, '--warn-age', '31h', '--max-age', '3d'),
                (WARNING, '--warn-age', '26h', '--max-age', '3d'),
                (CRITICAL, '--warn-age', '26h', '--max-age', '1d')):
            with self.subTest(words):
                self.assertEqual(self.age(status, *words), '')
        self.age(WARNING, '--warn-age=26h', '--max-age=3d',
                 says='s;93600;259200;0\n')

    def test_the_newest_counts_whatever_came_last(self):
        self.made('new', 1)
        self.made('copied', 9000)
        self.age(OK, '--max-age', '2h', says='new, 1 h 0 min old')
        with mock.patch.object(tarsnap, 'AGE_LOOK', 1):
            self.age(CRITICAL, '--max-age', '2h', says='copied')

    def test_of_one_second_the_last_by_name(self):
        made = '--creationtime=%d' % (time.time() - 60)
        for number in (3, 8, 1, 6):
            self.host.create('no%d' % number, made)
        self.age(OK, says='no8, ')

    def test_no_archive_and_none_that_is_complete(self):
        self.age(CRITICAL, says='there is no archive')

        def stop(run):
            raise tarsnap.Truncated
        self.made('old', 50)
        with mock.patch.object(tarsnap.Create, 'due', stop):
            self.host.run('-c', '-f', 'cut', '-C', self.lab.tree, '.')
        self.assertIn('cut.part', self.host.good('--list-archives').out)
        self.age(CRITICAL, '--max-age', '26h', says='old, 2 d 2 h')

    def test_one_of_tomorrow_is_left_out(self):
        self.made('tomorrow', -100)
        self.assertIn('yet to come', self.age(CRITICAL))
        self.made('old', 50)
        self.assertIn('yet to come', self.age(OK, says='old, '))

    def test_one_series(self):
        for number in range(5):
            self.made('db-2026-11-%02d' % (number + 1), 90 - number)
        for number in range(3):
            self.made('www%d' % number, 1, '--series=www')
        patch = mock.patch.object(tarsnap, 'AGE_LOOK', 2)
        patch.start()
        self.addCleanup(patch.stop)
        self.age(OK, '--max-age=2h', says='www')
        self.age(CRITICAL, '--max-age=2h', '--series', 'db-#',
                 says='db-2026-11-05, 3 d 14 h')
        self.age(CRITICAL, '--series', 'none', says='there is no archive')

    def test_what_cannot_be_found_out_is_3(self):
        self.made('a', 1)
        self.age(UNKNOWN, host=self.lab.host('w', (W,)), says='read auth')
        self.age(UNKNOWN, '--max-age', 'soon', says='Not a span of time')
        self.age(UNKNOWN, '--nonsense', says='Unknown option')
        self.age(UNKNOWN, '-f', 'a', says='-f')
        self.age(UNKNOWN, '--keyfile', '/nonexistent')
        self.age(UNKNOWN, '--expect-head', '9:' + 16 * 'a')
        with mock.patch.object(tarsnap, 'record_unpack',
                               side_effect=tarsnap.CorruptError('bad')):
            self.assertIn('is not known', self.age(UNKNOWN, says='bad'))

    def test_keys(self):
        self.made('a', 1)
        for roles in ((R,), (D,)):
            host = self.lab.host('x%d' % roles[0], roles)
            self.age(OK, host=host, says='a, 1 h')

    def test_json(self):
        def said(*args):
            found = json.loads(self.host.run(
                '--last-backup-age', '--json', *args).out)
            self.assertEqual(found.pop('type'), 'age')
            return found
        self.assertEqual(said(), {'age': None, 'status': 'critical'})
        self.made('a', 1)
        found = said('--max-age=2h')
        self.assertEqual((found['name'], found['status']), ('a', 'ok'))
        self.assertTrue(3600 <= found['age'] < 7200)
        self.assertTrue(re.match('20..-', found['created']))


if __name__ == '__main__':
    unittest.main()
