# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A share of `make model`, and that each rule it stands on is needed."""

import os
import re
import subprocess
import sys
import unittest
from unittest import mock

import model
import tarsnap
from world import ROOT, seed_choose

SHARE = 700                 # schedules
SEARCH = 4000               # for a rule, if its seed shows nothing any more


class Share(unittest.TestCase):

    def test_nothing_is_lost_doubled_or_resurrected(self):
        first = seed_choose('model.py')
        done = subprocess.run(
            [sys.executable, model.__file__, '--seed', str(first), '--count',
             str(SHARE), '--jobs', '1'], stdout=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        words = dict(pair.rsplit(' ', 1) for pair in
                     done.stdout.splitlines()[-2].split(', '))
        for word in ('write', 'delete', 'undelete', 'nuke', 'abort', 'drops',
                     'copies', 'faults', 'crashes', 'deaths', 'CONFLICT',
                     'EXPIRED', 'EXISTS', 'MISMATCH', 'NOARCHIVE'):
            self.assertGreater(int(words.get(word, 0)), 0, word)

    def test_a_seed_says_all(self):
        """The same seed does the same again, to the last step."""
        with model.surroundings():
            first, second = [model.explore(5) for _ in range(2)]
        self.assertEqual((first.steps, first.stats, first.oracle.chain),
                         (second.steps, second.stats, second.oracle.chain))


class Rules(unittest.TestCase):
    """Each rule switched off: the checker finds what then goes wrong."""

    def check(self, rule):
        with model.surroundings():
            self.assertIsNone(model.violation(rule.seed, rule.mix,
                                              **rule.knobs))
        found = rule.search([rule.seed]) or rule.search(range(1, SEARCH))
        self.assertTrue(found, 'nothing goes wrong without "%s"' % rule.name)
        if found[0] != rule.seed:
            print('without "%s", seed %d: %s' % (rule.name, *found))

    def test_manual(self):
        """tarsnap-commits(7) names each rule, and no others."""
        with open(os.path.join(ROOT, 'man', 'tarsnap-commits.7')) as file:
            text = file.read()
        self.assertEqual(
            sorted(re.findall(r'^\.It Sy (.*)$', text, re.M)),
            sorted(rule.name for rule in model.RULES))

    def test_where_the_client_keeps_them(self):
        """What the manual says of tarsnap.py and its tests is there."""
        with open(os.path.join(ROOT, 'man', 'tarsnap-commits.7')) as file:
            text = file.read()
        places = re.findall(r'^\.Fn (\S+)$', text, re.M)
        self.assertGreater(len(places), 4)
        for place in places:
            found = tarsnap
            for name in place.split('.'):
                found = getattr(found, name)
        tests = re.findall(r'^\.Li (test_\w+)\.(\w+)$', text, re.M)
        self.assertGreater(len(tests), 4)
        for module, test in tests:
            with open(os.path.join(model.HERE, module + '.py')) as file:
                self.assertIn('def %s(' % test, file.read())


class Client(unittest.TestCase):

    def test_commit_n_alone_decides(self):
        """What is committed on top of an attempt does not undo it."""
        raw = b'of this run'

        def decided(*hashes):
            changes = [mock.Mock(hash=one) for one in hashes]
            with mock.patch.object(tarsnap, 'history_changes',
                                   lambda *_, lists: iter(changes)):
                found = tarsnap.commit_decided(None, (0, b''), raw)
            return found and found is changes[0]

        own, other = tarsnap.sha256(raw), tarsnap.sha256(b'of another')
        self.assertIs(decided(own), True)
        self.assertIs(decided(own, other), True)
        self.assertIs(decided(other, own), False)
        self.assertIsNone(decided())


def rule_test(rule):
    def test(self):
        self.check(rule)
    return test


for one in model.RULES:
    setattr(Rules, 'test_without_' + one.name.replace(' ', '_'),
            rule_test(one))


if __name__ == '__main__':
    unittest.main()
