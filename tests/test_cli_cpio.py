# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""@FILE and @- where the file is one of cpio(1), as cpio(1) writes it."""

import gzip
import os
import subprocess
import unittest

from test_cli_merge import TarTest, stdin


class Cpio(TarTest):
    """CLI 5.7 @FILE of a cpio archive."""

    def setUp(self):
        super().setUp()
        # Neither format has parts of a second.
        self.model = {name: dict(row, mtime=row['mtime'] // 10 ** 9 * 10 ** 9)
                      for name, row in self.model.items()}

    def cpio(self, form):
        """A cpio file of the tree; its path."""
        path = self.lab.path('t.' + form)
        with open(path, 'wb') as file:
            subprocess.run(
                'find . -print0 | cpio --quiet -0 -o -H ' + form, shell=True,
                check=True, cwd=self.lab.tree, stdout=file)
        return path

    def test_formats_packed_and_piped(self):
        for form in ('newc', 'crc', 'odc'):
            path = self.cpio(form)
            packed = path + '.gz'
            with open(path, 'rb') as file, gzip.open(packed, 'wb') as out:
                out.write(file.read())
            for kind, source in (('plain', path), ('packed', packed)):
                for way in ('file', 'pipe'):
                    name = '%s-%s-%s' % (form, kind, way)
                    with self.subTest(name):
                        if way == 'file':
                            self.host.good('-c', '-f', name, '@' + source)
                        else:
                            with stdin(source, True):
                                self.host.good('-c', '-f', name, '@-')
                        self.check(name)

    def test_empty_files_with_several_names(self):
        self.write('none', b'')
        os.link(os.path.join(self.lab.tree, 'none'),
                os.path.join(self.lab.tree, 'none too'))
        self.host.good('-c', '-f', 'e', '@' + self.cpio('newc'))
        found = self.host.extract('e')
        self.assertEqual(os.stat(os.path.join(found, 'none')).st_ino,
                         os.stat(os.path.join(found, 'none too')).st_ino)

    def test_damage(self):
        """One clear line; what came before is stored; exit 2."""
        with open(self.cpio('newc'), 'rb') as file:
            good = file.read()
        long = bytearray(good)
        long[94:102] = b'ffffffff'              # length of the first name
        for name, data, says in (
                ('cut', good[:len(good) // 2], 'cut short'),
                ('header', good[:110] + good[113:], 'damaged header'),
                ('number', good[:20] + b'x' + good[21:], 'invalid literal'),
                ('long', bytes(long), 'cut short'),
                ('no end', good[:good.rindex(b'070701')], 'cut short')):
            path = self.lab.path('damaged')
            with open(path, 'wb') as file:
                file.write(data)
            with self.subTest(name):
                result = self.host.run('-c', '-f', name, '@' + path)
                self.assertIn(result.status, (1, 2), result)
                lines = [line for line in result.err.splitlines()
                         if line.startswith('tarsnap: ' + path)]
                self.assertEqual(len(lines), 1, result)
                self.assertIn(says, lines[0])


if __name__ == '__main__':
    unittest.main()
