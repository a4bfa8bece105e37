# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The examples of tarsnap-format(5) open, and hold what the page says.

Once with formatreader, which knows the page only, once with the program's own
decoders: page, program and a stranger's reader agree.
"""

import hashlib
import os
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import format_examples                                      # noqa: E402
import formatreader as fr                                   # noqa: E402
import tarsnap                                              # noqa: E402


class Page(unittest.TestCase):
    """The displays of the page, as bytes and as documented values."""

    @classmethod
    def setUpClass(cls):
        cls.displays = format_examples.blocks(format_examples.FORMAT)
        cls.text = cls.displays['example', 'keyfile']
        cls.key = fr.key_fields(cls.text)

    def block(self, name):
        return bytes.fromhex(self.displays['example', name])

    def said(self, name):
        """The documented values of an example; lists of str."""
        return format_examples.values(self.displays['values', name])

    def hex(self, name, field):
        return bytes.fromhex(self.said(name)[field][0])

    def the_text(self):
        text, said, times = self.said('chunk')['text'][0].rpartition(
            ', and a newline, ')
        self.assertTrue(said)
        return (text.encode() + b'\n') * int(times.split()[0])


class FromThePage(Page):
    """formatreader against the page."""

    def test_key_file(self):
        said = self.said('keyfile')
        self.assertEqual(int.from_bytes(self.key[1], 'big'),
                         int(said['machine'][0]))
        self.assertEqual(self.key[2].hex(), said['store'][0])
        self.assertEqual(self.key[3].decode(), said['server'][0])
        self.assertEqual(fr.key_fingerprint(self.key).hex(),
                         said['fingerprint'][0])
        self.assertEqual(fr.genesis(self.key).hex(), said['h0'][0])

    def chunk(self):
        name = self.hex('chunk', 'name')
        data, = fr.block_open(self.key, b'c', name, self.block('chunk'))
        self.assertEqual(fr.name_chunk(self.key, data), name)
        return data

    def test_chunk(self):
        self.assertEqual(self.chunk(), self.the_text())

    def test_page(self):
        said = self.said('page')
        page = fr.index_open(self.key, self.hex('page', 'name'),
                             self.block('page'))
        self.assertEqual(page['kind'], int(said['kind'][0]))
        self.assertEqual(page['digest'].hex(), said['digest'][0])
        self.assertEqual([kid_words(kid) for kid in page['kids']],
                         said['kid'])
        rows = fr.page_rows(page)
        self.assertEqual([row_words(row) for row in rows], said['row'])
        data = self.chunk()
        self.assertEqual(
            fr.content(rows[1], page['kids'], lambda kid: data), data)
        self.assertEqual(
            fr.content(rows[3], page['kids'], lambda kid: data),
            bytes(4096) + data[:9] * 3)

    def test_list(self):
        said = self.said('list')
        block = fr.index_open(self.key, self.hex('list', 'name'),
                              self.block('list'))
        self.assertEqual((block['kind'], block['level']), (2, 1))
        self.assertEqual([kid_words(kid) for kid in block['kids']],
                         said['kid'])
        self.assertEqual(['%s %d %d' % (first.decode(), entries, size)
                          for first, entries, size in fr.list_notes(block)],
                         said['below'])

    def test_record(self):
        said = self.said('record')
        record = fr.record_open(self.key, self.hex('record', 'name'),
                                self.block('record'))
        self.assertEqual(record['title'].decode(), said['title'][0])
        self.assertEqual(record['archive'].hex(), said['archive'][0])
        self.assertEqual(record['series'].hex(), said['tag'][0])
        self.assertEqual(fr.series_tag(self.key, said['series'][0].encode()),
                         record['series'])
        self.assertEqual(b' '.join(record['argv']).decode(), said['argv'][0])
        self.assertEqual(record['host'].decode(), said['host'][0])
        for field in ('entries', 'pages', 'bytes', 'created'):
            self.assertEqual(record[field], int(said[field][0]))

    def test_commit(self):
        said = self.said('commit')
        commit = fr.commit_read(self.key, self.block('commit'))
        self.assertEqual(commit['hash'].hex(), said['hash'][0])
        self.assertEqual(commit['previous'], fr.genesis(self.key))
        linked, = commit['linked']
        self.assertEqual('%s %s %s %d' % (*(part.hex() for part
                                            in linked[:3]), linked[3]),
                         said['linked'][0])
        self.assertEqual(linked[1], self.hex('record', 'name'))
        self.assertEqual(fr.live_digest([(linked[0], linked[1], linked[3])]),
                         commit['live'])
        self.assertEqual('%d %s' % (commit['put'][0], commit['put'][1].hex()),
                         said['put'][0])
        self.assertEqual(' '.join(map(str, fr.note_open(self.key, commit))),
                         said['note'][0])

    def test_a_changed_byte_is_seen(self):
        # The reader is a fair judge only if it refuses what is wrong.
        block = bytearray(self.block('page'))
        for at in range(0, len(block), 7):
            block[at] ^= 1
            with self.assertRaises(Exception):
                fr.index_open(self.key, self.hex('page', 'name'),
                              bytes(block))
            block[at] ^= 1


class ByTheProgram(Page):
    """tarsnap.py's decoders against the same page."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.theirs = tarsnap.key_decode(
            tarsnap.key_untext(cls.text.encode(), 'page'), 'page')
        cls.opener = tarsnap.Opener(cls.theirs)
        cls.names = tarsnap.Names(cls.theirs)

    def test_key_file(self):
        said = self.said('keyfile')
        self.assertEqual(self.theirs.machine, int(said['machine'][0]))
        self.assertEqual(self.theirs.public_hash().hex(),
                         said['fingerprint'][0])
        self.assertEqual(self.theirs.genesis().hex(), said['h0'][0])

    def test_chunk(self):
        name = self.hex('chunk', 'name')
        data, = self.opener.open(b'c', name, self.block('chunk'))
        self.assertEqual(data, self.the_text())
        self.assertEqual(self.names.chunk(data), name)

    def index(self, which):
        name = self.hex(which, 'name')
        refs, rows = self.opener.open(b'i', name, self.block(which))
        self.assertEqual(self.names.index(refs), name)
        block = tarsnap.index_unpack(refs, name)
        self.assertEqual(self.names.rows(rows), block.digest)
        block.rows = rows
        return block

    def test_page_and_list(self):
        page = self.index('page')
        self.assertEqual([format_examples.row_words(entry)
                          for entry in tarsnap.page_entries(page)],
                         self.said('page')['row'])
        notes = tarsnap.list_notes(self.index('list'))
        self.assertEqual(['%s %d %d' % (first.decode(), entries, size)
                          for first, entries, size in notes],
                         self.said('list')['below'])

    def test_refs_view_is_a_prefix(self):
        # What a server gives a pruning key opens to the refs parts.
        block = self.block('record')
        whole = self.opener.open(b'a', self.hex('record', 'name'), block)
        at = 35
        for _ in range(2):
            at += 5 + int.from_bytes(block[at + 1:at + 5], 'big')
        view = self.opener.open(b'a', self.hex('record', 'name'), block[:at],
                                refs_only=True)
        self.assertEqual(view, whole[:2])

    def test_record(self):
        said, name = self.said('record'), self.hex('record', 'name')
        parts = self.opener.open(b'a', name, self.block('record'))
        self.assertEqual(self.names.record(parts[0]), name)
        record = tarsnap.record_unpack(parts, name, self.theirs)
        self.assertEqual(record.title.decode(), said['title'][0])
        self.assertEqual(tarsnap.series_of(record.title).decode(),
                         said['series'][0])
        self.assertEqual(record.bytes, int(said['bytes'][0]))

    def test_commit(self):
        said, data = self.said('commit'), self.block('commit')
        commit = tarsnap.commit_unpack(data, self.theirs)
        self.assertEqual(hashlib.sha256(data).hexdigest(), said['hash'][0])
        self.assertEqual(commit.live.hex(), said['live'][0])
        self.assertEqual(
            ' '.join(map(str, tarsnap.note_open(self.theirs, commit))),
            said['note'][0])


class Encoders(Page):
    """What the program writes today is what the page shows."""

    def test_examples_are_up_to_date(self):
        # A deflated part may differ with the zlib in use; the rest may not.
        made = format_examples.Examples().make()
        for which, text in made.items():
            if which == ('example', 'chunk'):
                continue
            with self.subTest(which):
                self.assertEqual(format_examples.fold(text)
                                 if which[0] == 'values' else text,
                                 self.displays[which])

    def test_series_of_the_page(self):
        for title, series in (
                (b'a-2026-11-22', b'a-#'), (b'20261122', b'#'),
                (b'a-2026-11-22_10:30:59-b', b'a-#-b'),
                (b'a-20261122-1030', b'a-#'), (b'a-1700000000', b'a-#'),
                (b'a-2026-11-22-2026-11-23', b'a-2026-11-22-2026-11-23'),
                (b'web1', b'web1'), (b'a-2700000000', b'a-2700000000')):
            self.assertEqual(tarsnap.series_of(title), series)


def kid_words(kid):
    return '%s %s %d %d' % (kid['class'].decode(), kid['name'].hex(),
                            kid['plain'], kid['times'])


def row_words(row):
    """As format_examples.row_words, of a row of formatreader's."""
    out = '%s %o %d %d %s %s %d.%09d %d %s' % (
        row['kind'].decode(), row['mode'], row['uid'], row['gid'],
        row['uname'].decode(), row['gname'].decode(), *row['mtime'],
        row['size'], row['path'].decode())
    if 'target' in row:
        out += ' -> ' + row['target'].decode()
    return out


if __name__ == '__main__':
    unittest.main()
