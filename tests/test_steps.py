#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Steps get what came of their wishes, or have it thrown in, and return."""

import unittest

import tarsnapd
from tarsnapd import ProviderError, Refused, StoreError


def asking(*wishes):
    """Steps: ask for each; what came of each."""
    results = []
    for wish in wishes:
        try:
            results.append((yield wish))
        except (StoreError, Refused, ProviderError) as e:
            results.append(e)
    return results


class Steps(unittest.TestCase):

    def setUp(self):
        self.asked = []
        self.errors = {'get': StoreError('get', 'x', 'gone'),
                       'view': Refused(tarsnapd.E_BAD, 'no'),
                       'provider': ProviderError('down', 500)}

    def perform(self, wish):
        self.asked.append(wish)
        if wish[0] == 'all':
            return [self.errors.get(one[0], one) for one in wish[1]]
        if wish[0] in self.errors:
            raise self.errors[wish[0]]
        return wish

    def test_each_gets_what_came_of_it(self):
        wishes = [(verb, 'x') for verb in (
            'get', 'size', 'view', 'view', 'put', 'provider', 'now')]
        self.assertEqual(
            tarsnapd.carry_out(asking(*wishes), self.perform),
            [self.errors.get(wish[0], wish) for wish in wishes])
        self.assertEqual(self.asked, wishes)

    def test_answers_and_waits_are_not_performed(self):
        wishes = [('now',), ('answer', 1, b''), ('wait', 0), ('answer', 2)]
        going = tarsnapd.turns(asking(*wishes), self.perform)
        for i, wish in enumerate(wishes):
            self.assertEqual((next(going), self.asked),
                             (wish, wishes[:1]), i)
        with self.assertRaises(StopIteration) as end:
            next(going)
        self.assertEqual(end.exception.value, [('now',), None, None, None])

    def test_what_steps_do_not_catch_ends_them(self):
        def steps():
            yield ('get', 'x')

        with self.assertRaises(StoreError) as end:
            tarsnapd.carry_out(steps(), self.perform)
        self.assertIs(end.exception, self.errors['get'])

    def test_other_errors_are_not_theirs(self):
        with self.assertRaises(ZeroDivisionError):
            tarsnapd.carry_out(asking(('now',)), lambda wish: 1 // 0)

    def test_several_side_by_side(self):
        several = [asking(('size', 'a'), ('get', 'b')), asking(('put', 'c')),
                   asking()]
        self.assertEqual(
            tarsnapd.carry_out(tarsnapd.together(several), self.perform),
            [[('size', 'a'), self.errors['get']], [('put', 'c')], []])
        self.assertEqual(self.asked, [
            ('all', [('size', 'a'), ('put', 'c')]), ('all', [('get', 'b')])])


if __name__ == '__main__':
    unittest.main()
