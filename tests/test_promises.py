# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap-promises(7): each promise is one line, and each test it names is
there.
"""

import ast
import os
import re
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
PAGE = os.path.join(os.path.dirname(HERE), 'man', 'tarsnap-promises.7')


def promises():
    """[(text, [test])] of the page."""
    with open(PAGE) as file:
        text = file.read().replace('\\\n', '')     # of a long line
    blocks = re.split(r'(?m)^\.It\n', text)[1:]
    found = []
    for block in blocks:
        lines = block.split('\n.El\n')[0].splitlines()
        found.append((
            ' '.join(x for x in lines if not x.startswith('.')),
            [x[4:] for x in lines if x.startswith('.Dl ')]))
    return found


def module(name, cache={}):
    """{class: (its own methods, its bases)} of a module of tests."""
    if name not in cache:
        cache[name] = classes = {}
        path = os.path.join(HERE, name + '.py')
        if os.path.exists(path):
            with open(path) as file:
                tree = ast.parse(file.read())
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    classes[node.name] = (
                        {x.name for x in node.body
                         if isinstance(x, ast.FunctionDef)},
                        [ast.unparse(base) for base in node.bases])
    return cache[name]


def has(name, cls, test):
    """True if a class has a test, of its own or by what it is made of."""
    methods, bases = module(name).get(cls, ((), ()))
    return test in methods or any(
        has(*(base.split('.') if '.' in base else (name, base)), test)
        for base in bases)


class Promises(unittest.TestCase):

    def test_each_is_one_line_with_a_test(self):
        found = promises()
        self.assertGreater(len(found), 40)
        for text, tests in found:
            self.assertTrue(text.endswith('.') and len(text) < 100, text)
            self.assertTrue(tests, text)

    def test_each_test_is_there(self):
        self.assertFalse(has('test_promises', 'Promises', 'test_no_such'))
        for text, tests in promises():
            for test in tests:
                self.assertRegex(test, r'\Atest_\w+\.\w+\.test_\w+\Z')
                self.assertTrue(has(*test.split('.')), test)


if __name__ == '__main__':
    unittest.main()
