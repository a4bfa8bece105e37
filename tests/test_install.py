# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""`pip install .` gives commands that do the job, and their manuals."""

import os
import shutil
import sys
import unittest
import venv

import world

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMANDS = ('tarsnap', 'tarsnapd', 'cronwatch', 'tarsnap-keygen',
            'tarsnap-keyregen', 'tarsnap-keymgmt', 'tarsnap-recrypt')


class Install(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'dir')
        cls.prefix = w.path('venv')
        # cryptography is the one that runs the tests.
        venv.create(cls.prefix, with_pip=True, system_site_packages=True)
        # setuptools builds in the source tree.
        source = w.path('source')
        os.mkdir(source)
        for name in ('man', 'LICENSE', 'README.md', 'setup.cfg',
                     'pyproject.toml', 'tarsnap.py', 'tarsnapd.py',
                     'keygen.py', 'cronwatch.py'):
            path = os.path.join(ROOT, name)
            copy = shutil.copytree if os.path.isdir(path) else shutil.copy
            copy(path, os.path.join(source, name))
        # --system-site-packages leads past a virtual environment that the
        # tests may run in.
        for path in sys.path:
            if os.path.isdir(os.path.join(path, 'cryptography')):
                with open(os.path.join(cls.site(), 'tests.pth'), 'w') as file:
                    file.write(path + '\n')
                break
        done = w.run([cls.command('python3'), '-m', 'pip', '-q', 'install',
                      '--no-deps', '.'], cwd=source,
                     env=dict(os.environ, **w.environment))
        if done.code:
            raise AssertionError('pip install: %r' % done)

    @classmethod
    def command(cls, name):
        return os.path.join(cls.prefix, 'bin', name)

    @classmethod
    def site(cls):
        return os.path.join(cls.prefix, 'lib', 'python%d.%d'
                            % sys.version_info[:2], 'site-packages')

    def run_all(self, *commands):
        """Each must succeed and be silent on stderr; the last one's Done."""
        for command in commands:
            done = self.world.run([self.command(command[0]), *command[1:]])
            self.assertEqual(done.code, 0, (command, done))
        return done

    def test_the_commands_do_the_job(self):
        w = self.world
        world.write(w.path('tree', 'file'), b'content')
        both = ('--no-default-config', '--keyfile', w.path('K'),
                '--cachedir', w.path('C'))
        self.run_all(
            ('tarsnap-keygen', '--keyfile', w.path('K'), '--machine', 'm',
             '--server', w.path('store')),
            ('tarsnap', *both, '-c', '-f', 'one', '-C', w.root, 'tree'),
            ('tarsnap-keymgmt', '--outkeyfile', w.path('R'), '-r',
             w.path('K')))
        done = self.run_all(('tarsnap', *both, '-t', '-f', 'one'))
        self.assertEqual(done.out, 'tree/\ntree/file\n')

    def test_all_of_them_are_there(self):
        for name in COMMANDS:
            done = self.run_all((name, '--version'))
            self.assertEqual((done.out + done.err).split()[0], name)

    def test_manuals(self):
        pages = {os.path.relpath(os.path.join(folder, name), self.prefix)
                 for folder, _, names in os.walk(os.path.join(
                     self.prefix, 'share', 'man')) for name in names}
        self.assertEqual(pages, {
            'share/man/man%s/%s' % (name[-1], name)
            for name in os.listdir(os.path.join(ROOT, 'man'))
            if name[-1].isdigit()})


if __name__ == '__main__':
    unittest.main()
