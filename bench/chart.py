#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Draws what bench/compare.py --json wrote as an SVG bar chart.

usage: bench/chart.py JSON SVG [TREE [local|network]]

For each work a group of bars, one for each program, as long as its median
beside the longest of the group; the whisker goes from the least to the most.
Colours follow the reader's choice of a light or a dark page.
"""

import json
import os
import sys
from xml.sax.saxutils import escape

TITLES = {
    'first': 'first backup', 'unchanged': 'unchanged backup',
    'shifted': 'one byte in front', 'list': 'list', 'restore': 'restore',
    'delete': 'delete one of two', 'stored after first': 'stored'}
NAMES = {'embedded': 'this', 'tls': 'this', 'isal': 'this with ISA-L',
         'restic-rest': 'restic', 'borg-serve': 'borg'}
KINDS = {'embedded': 'this', 'tls': 'this', 'isal': 'floor', 'floor': 'floor',
         'packing': 'floor'}        # else peer
HALVES = {'local': 'local repository', 'network': 'over the network'}

# Pixels.
WIDTH, LEFT, RIGHT, BAR, GAP, HEAD = 720, 200, 120, 16, 14, 46

STYLE = '''\
.page { fill: #ffffff }
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.head { font-weight: 600; font-size: 15px }
.note, .value { fill: #59636e; font-size: 12px }
.this { fill: #0969da } .peer { fill: #afb8c1 } .floor { fill: #d8dee4 }
.spread { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117 }
  text { fill: #f0f6fc } .note, .value { fill: #9198a1 }
  .this { fill: #4493f8 } .peer { fill: #656c76 } .floor { fill: #3d444d }
  .spread { stroke: #f0f6fc }
}
'''


def text(x, y, what, kind='', anchor='start'):
    return '<text x="%d" y="%d" class="%s" text-anchor="%s">%s</text>' % (
        x, y, kind, anchor, escape(what))


def bar(y, figure, unit, most):
    """One program's bar: name, length, whisker, figure."""
    name = NAMES.get(figure['program'], figure['program'])
    scale = (WIDTH - LEFT - RIGHT) / most
    values = figure[unit]
    long = values['median'] * scale
    kind = KINDS.get(figure['program'], 'peer')
    value = ('%.0f MB' % (values['median'] / 1e6) if unit == 'bytes'
             else '%.2f s' % values['median'])
    out = [text(LEFT - 8, y + 12, name, anchor='end'),
           '<rect x="%d" y="%d" width="%.1f" height="%d" class="%s"/>' % (
               LEFT, y, max(long, 1), BAR - 3, kind)]
    if len(figure['runs']) > 1:
        out.append('<path d="M%.1f %dH%.1f" class="spread"/>' % (
            LEFT + values['least'] * scale, y + BAR // 2 - 1,
            LEFT + values['most'] * scale))
    return out + [text(LEFT + values['most'] * scale + 6, y + 12, value,
                       'value')]


def draw(document, tree, half):
    """The lines of the SVG."""
    out, y = [], HEAD
    for work, title in TITLES.items():
        figures = [figure for figure in document['figures']
                   if (figure['tree'], figure['half'], figure['work'])
                   == (tree, half, work)]
        if not figures:
            continue
        unit = 'bytes' if 'bytes' in figures[0] else 'seconds'
        most = max(figure[unit]['most'] for figure in figures) or 1
        out.append(text(10, y + 12, title))
        for figure in figures:
            out += bar(y, figure, unit, most)
            y += BAR
        y += GAP
    versions = document['versions']
    note = ['%d processors' % document['machine']['processors']] + [
        versions[name].partition(' compiled')[0]
        for name in ('restic', 'borg') if name in versions]
    return [
        '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" '
        'viewBox="0 0 %d %d" role="img">' % (WIDTH, y + 14, WIDTH, y + 14),
        '<style>%s</style>' % STYLE,
        # Its own ground: a page may be dark where the system is light.
        '<rect width="100%" height="100%" rx="6" class="page"/>',
        text(10, 22, 'Tree %s, %s: median and spread, shorter is better' % (
            os.path.basename(tree), HALVES[half]), 'head'),
        *out, text(10, y + 6, ', '.join(note), 'note'), '</svg>']


def main():
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__.split('\n\n')[1])
    with open(sys.argv[1]) as file:
        document = json.load(file)
    first = document['figures'][0]
    tree, half = sys.argv[3:] + [first['tree'], 'local'][len(sys.argv) - 3:]
    lines = draw(document, tree, half)
    with open(sys.argv[2], 'w') as file:
        file.write('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
