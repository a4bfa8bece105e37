# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The trees that are backed up: chosen on this machine, or generated.

`small` is one Python installation (about 9 000 files, 300 MB), `large` is
several (about 120 000 files, 2.4 GB), as the machine has them; where it has
none of that size they are generated: the same number of files, spread of sizes
and compressibility, always the same bytes.  `file` is one file of random
bytes, and the same with one byte more in front.
"""

import itertools
import multiprocessing
import os
import random
import sys

SMALL_FILES = 9000
LARGE_PARTS = 13        # generated installations that make `large`

# Of the files of a Python 3.12 installation SHARES are below SIZES, bytes.
# The mean is 34 KB, and the largest hundredth has near half of it all.
SHARES = (0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .99, .995, .999, 1)
SIZES = (1, 373, 1225, 2433, 4021, 6853, 10712, 16125, 28144, 58786, 99174,
         248891, 340789, 833528, 62373488)


def apart(function, *args):
    """Call a function in a process of its own, so that the memory it needs
    is not the start of what is measured later.
    """
    child = multiprocessing.get_context('fork').Process(
        target=function, args=args)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit('%s: exit %d' % (function.__name__, child.exitcode))


def installations():
    """Directories with a Python of their own, at or beside the one that
    runs; not a whole /usr.
    """
    base = os.path.realpath(sys.base_prefix)
    if base in ('/usr', '/usr/local', '/'):
        return []
    parent = os.path.dirname(base)
    found = [os.path.join(parent, name) for name in sorted(os.listdir(parent))]
    return [path for path in found if not os.path.islink(path)
            and os.path.exists(os.path.join(path, 'bin', 'python3'))] or [base]


def extent(tree):
    """(files, bytes) of a tree by its inodes."""
    files = size = 0
    for folder, _, names in os.walk(tree):
        for name in names:
            files += 1
            size += os.lstat(os.path.join(folder, name)).st_size
    return files, size


def small(make):
    """The installation that is nearest to 300 MB, or one generated in the
    directory that make() returns.
    """
    fit = []
    for path in installations():
        files, size = extent(path)
        if 5000 <= files <= 15000 and 200e6 <= size <= 500e6:
            fit.append((abs(size - 300e6), path))
    if fit:
        return min(fit)[1]
    tree = make()
    apart(generate, tree, SMALL_FILES)
    return tree


def large(make):
    """All installations here if they are large enough, or as many made."""
    found = installations()
    if len(found) > 1:
        parent = os.path.dirname(found[0])
        files, size = extent(parent)
        if 50e3 <= files <= 400e3 and 1.5e9 <= size <= 8e9:
            return parent
    tree = make()
    apart(generate, tree, SMALL_FILES, range(LARGE_PARTS))
    return tree


def size_draw(rng):
    """Bytes of a file of an installation."""
    at = rng.random()
    i = next(i for i, share in enumerate(SHARES) if at < share)
    inside = (at - SHARES[i - 1]) / (SHARES[i] - SHARES[i - 1])
    return int(SIZES[i - 1] * (SIZES[i] / SIZES[i - 1]) ** inside)


class Lines:
    """Lines that look like source, a dictionary of them made once: text that
    deflates to about 30 %.
    """

    def __init__(self):
        rng = random.Random('lines')
        letters = 'etaoinshrdlucmfwypvbgkjqxz'
        words = [''.join(rng.choices(letters, range(26, 0, -1),
                                     k=rng.randint(2, 9)))
                 for _ in range(6000)]
        self.lines = [
            (' ' * 4 * rng.randint(0, 4) + ' '.join(
                words[min(5999, int(rng.paretovariate(.3)))]
                for _ in range(rng.randint(1, 9))) + '\n').encode()
            for _ in range(50000)]

    def data(self, rng, size):
        """So many bytes; one file in eight is as dense as a library."""
        if rng.random() < .125:
            half = rng.randbytes(size // 2)
            return half + self.data_text(rng, size - len(half))
        return self.data_text(rng, size)

    def data_text(self, rng, size):
        return b''.join(rng.choices(self.lines, k=size // 25 + 8))[:size]


def generate(tree, files, parts=range(1)):
    """A tree like an installation, or several like its versions: a third of
    the files of a part are as in the part before.
    """
    lines = Lines()
    for part, i in itertools.product(parts, range(files)):
        edition = part
        while edition and random.Random('%d-%d' % (i, edition)).random() < .33:
            edition -= 1
        rng = random.Random('file-%d-%d' % (i, edition))
        folder = os.path.join(
            tree, 'python-%d' % part, 'package%d' % (i // 90),
            'module%d' % (i // 15))
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'part_%d.py' % i), 'wb') as file:
            file.write(lines.data(rng, size_draw(rng)))


def tiny(tree, files, first=0):
    """Files of a few bytes, all different, a thousand to a directory."""
    for i in range(first, first + files):
        folder = os.path.join(tree, '%05d' % (i // 1000))
        if i == first or not i % 1000:
            os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'f%07d' % i), 'wb') as file:
            file.write(b'file number %d\n' % i)


def noise(path, size, front=b''):
    """A file of random bytes, always the same, behind `front`."""
    rng = random.Random('noise')
    with open(path, 'wb') as file:
        file.write(front)
        while size:
            piece = min(size, 1 << 20)
            file.write(rng.randbytes(piece))
            size -= piece
