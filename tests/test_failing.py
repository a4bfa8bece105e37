# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A share of `make faults`: each call may fail; one clear line, nothing lost.
"""

import os
import random
import re
import subprocess
import sys
import unittest

from world import seed_choose

HERE = os.path.dirname(os.path.abspath(__file__))
# Faults of each part; the long run has them all.
SHARE = {'client': 8, 'server': 6, 'verbs': 6, 'net': 3, 'served': 4, 's3': 3}


class Share(unittest.TestCase):

    def faults(self, part, count, seed):
        done = subprocess.run(
            [sys.executable, os.path.join(HERE, 'failing.py'), '--seed',
             str(seed), '--count', str(count), part],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(
            done.stdout.splitlines()[-1], re.compile(
                r'\d+ runs, 0 kills, 0 power cuts, %d faults, 0 corrupt, '
                r'0 lost committed, \d+ failed\Z' % count), done.stdout)

    def test_two_of_the_parts(self):
        seed = seed_choose('parts')
        for part in random.Random(seed).sample(sorted(SHARE), 2):
            with self.subTest(part=part):
                self.faults(part, SHARE[part], seed)


if __name__ == '__main__':
    unittest.main()
