# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""figures: what an account has, used and paid, as pages, charts and CSV.

All of it is of the view of the ledger that web.History keeps.  A day is one
of UTC; amounts are attodollars until they are shown.
"""

import collections
import os

import web                      # which knows where tarsnapd.py is
from web import Html, h, para, tarsnapd

day_text, money_text = tarsnapd.day_text, tarsnapd.money_text
money_short = tarsnapd.money_short

SILENT_DAYS = 3                 # at least, until a machine is missed
USUAL_DAYS = 92                 # from which it is seen how often it comes

##############################################################################
# An account
##############################################################################


class Machine:
    """A machine of the account, as its ledger knows it."""

    def __init__(self, number, name, size, backup):
        self.number = number    # 16 hexadecimal digits
        self.name = name        # '' where it is not known
        self.label = name or number     # no other machine's
        self.bytes = size       # live at the end of the last day, or None
        self.backup = backup    # last day on which it stored something
        self.usual = None       # days from one backup to the next
        self.silent = False     # for much longer than that


class Account:
    """What there is to say of the account that is logged in."""

    def __init__(self, site, account):
        self.site = site
        self.account = account
        self.ident = account['id']
        self.today = site.now // tarsnapd.DAY
        self.balance = site.balance(account)    # Balance
        self.billed = site.perform(('view', 'billed'))

    def view(self, method, *args):
        return self.site.perform(('view', method, self.ident, *args))

    def left(self):
        """Whole days that the balance lasts; None: for ever, or nobody pays.
        """
        if not self.site.prices:
            return None
        return tarsnapd.days_left(self.balance, self.site.prices,
                                  self.site.now)

    def balance_before(self, day, entries):
        """The balance at the beginning of a day; `entries` are all there
        are, as of History.money.
        """
        first, _ = tarsnapd.month_days(day)
        spent = self.view('used_before', tarsnapd.month_text(day))
        for _, _, used, prices in self.view('days_of', first, day - 1):
            spent += sum(a * b for a, b in zip(used, prices))
        return sum(amount for when, _, _, amount, _ in entries
                   if when < day * tarsnapd.DAY) - spent

    def machines(self):
        """[Machine], by name."""
        names = self.site.run(tarsnapd.owned_machines(self.ident))
        known = self.view('machines')
        for number in known.keys() - names.keys():      # of before there
            if self.site.run(tarsnapd.owner_get(        # was owned/
                    int(number, 16))) == self.ident:
                names[number] = ''
        backups = self.view('backup_days', self.today - USUAL_DAYS)
        found = []
        for number, name in names.items():
            machine = Machine(number, name, *known.get(number, (None, None)))
            if name and list(names.values()).count(name) > 1:
                machine.label = '%s (%s)' % (name, number)
            self.watch(machine, backups.get(number, []))
            found.append(machine)
        return sorted(found, key=lambda one: (one.name, one.number))

    def watch(self, machine, days):
        """See whether a machine with backups on these days is missed."""
        gaps = sorted(b - a for a, b in zip(days, days[1:]))
        if gaps:
            machine.usual = gaps[len(gaps) // 2]
        if machine.backup is not None and machine.bytes:
            since = self.billed - machine.backup
            machine.silent = since > max(SILENT_DAYS,
                                         2 * (machine.usual or 3) + 1)


##############################################################################
# Activity
#
# Rows as programs have them: each day on which something was used or entered,
# and today, begins with the balance at its end; entries of money follow, then
# what was used.  So the last balance is that of now.
##############################################################################

Row = collections.namedtuple(
    'Row', 'rectype day machine type quantity amount balance')


def activity(account, first, last, verbose=False):
    """Rows of days `first` to `last`, by machine or for all together."""
    names = {machine.number: machine.label
             for machine in account.machines()} if verbose else {}
    days, entries = {}, account.view('money')
    for line in tarsnapd.statement_lines(
            account.view('days_of', first, last),
            [one for one in entries
             if first * tarsnapd.DAY <= one[0] < (last + 1) * tarsnapd.DAY]):
        days.setdefault(line.day, []).append(line)
    balance = account.balance_before(first, entries)
    if first <= account.today <= last:
        days.setdefault(account.today, [])
    for day, lines in sorted(days.items()):
        balance += sum(line.amount for line in lines)
        yield Row('Balance', day, '', '', '', None, balance)
        for line in lines:
            if line.quantity is None:
                yield Row('Payment', day, '', line.kind, '', line.amount,
                          None)
        for machine, kind, quantity, amount in usage_sums(
                lines, names if verbose else None):
            yield Row('Usage', day, machine, kind, quantity, amount, None)


def usage_sums(lines, names):
    """[(machine, type, quantity, amount)] of a day, for each machine by its
    name in `names`, or with None for all together.
    """
    sums = {}
    for line in lines:
        if line.quantity is not None:
            name = '' if names is None else names.get(line.machine,
                                                      line.machine)
            old = sums.get((name, line.kind), (0, 0))
            sums[name, line.kind] = (old[0] + line.quantity,
                                     old[1] - line.amount)
    return [(name, kind, *both) for (name, kind), both in sorted(
        sums.items(), key=lambda one: (
            one[0][0], tarsnapd.CHARGES.index(one[0][1])))]


def csv_answer(heads, rows, name):
    """An Answer of CSV, a file called `name`."""
    import csv
    import io
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow(heads)
    writer.writerows(rows)
    return web.Answer(out.getvalue(), 'text/csv; charset=utf-8', headers=[
        ('Content-Disposition', 'attachment; filename="%s"' % name)])


def csv_rows(rows, verbose):
    """Rows as CSV has them, all 18 digits of amounts."""
    for row in rows:
        yield (row.rectype, day_text(row.day),
               *([tarsnapd.csv_safe(row.machine)] if verbose else []),
               row.type, row.quantity,
               '' if row.amount is None else money_text(row.amount),
               '' if row.balance is None else money_text(row.balance))


def activity_csv(account, first, last, verbose):
    return csv_answer(
        ('RECTYPE', 'DATE', *(['MACHINE'] if verbose else []), 'TYPE',
         'QUANTITY', 'AMOUNT', 'BALANCE'),
        csv_rows(activity(account, first, last, verbose), verbose),
        'activity-%s.csv' % day_text(first))


def machine_rows(account, number, first, last):
    """[(day, type, quantity, amount)] of one machine."""
    return [(line.day, line.kind, line.quantity, -line.amount)
            for line in tarsnapd.statement_lines(
                account.view('days_of', first, last, number), ())]


def machine_csv(account, number, first, last):
    return csv_answer(('DATE', 'TYPE', 'QUANTITY', 'AMOUNT'), [
        (day_text(day), kind, quantity, money_text(amount))
        for day, kind, quantity, amount in machine_rows(
            account, number, first, last)], 'machine-%s.csv' % number)


class Month:
    """The month that a query asks for, this one if it asks for none."""

    def __init__(self, account):
        text = account.site.request.query.get('month')
        day = account.today
        if text is not None:
            try:
                day = tarsnapd.day_parse(text + '-01')
            except web.ServerError:
                raise web.bad('A month is like 2026-11.') from None
        self.first, self.after = tarsnapd.month_days(day)
        self.last = min(self.after - 1, account.today)
        self.text = tarsnapd.month_text(self.first)

    def links(self, script, account, query=''):
        """To the months before and after, as far as there may be any."""
        found = []
        for day, label in ((self.first - 1, 'Month before'),
                           (self.after, 'Month after')):
            if account.account['created'] // tarsnapd.DAY <= day and (
                    day <= account.today) or label == 'Month before' and (
                        account.view('used_before', self.text)):
                found.append(h('<a href="{}?month={}{}">{}</a>', script,
                               tarsnapd.month_text(day), query, label))
        found.append(h('<a href="{}?month={}{}&amp;format=csv">CSV</a>',
                       script, self.text, query))
        return h('<p class="links">{}</p>', web.join(found))


##############################################################################
# Charts
#
# Inline SVG, without a style of its own: the policy forbids that, and the
# style sheet knows dark from light.
##############################################################################

WIDTH, HEIGHT, LEFT, BELOW = 640, 200, 84, 22      # user units


def scale_top(most):
    """A round number not below `most`."""
    top = 1
    while top < most:
        for step in (1, 2, 5, 10):
            if top * step >= most:
                return top * step
        top *= 10
    return top


def chart(title, month, bars, words):
    """Stacked bars, {day: [quantities]}, of a month.

    `words` are what the parts of a bar are, one for each.
    """
    days = month.after - month.first
    top = scale_top(max([sum(bar) for bar in bars.values()] or [0]) or 1)
    width = (WIDTH - LEFT) / days
    parts = []
    for share in (0, 0.5, 1):
        y = HEIGHT * (1 - share) + 8
        parts.append(h(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text x="{}" y="{}" text-anchor="end">{}</text>', LEFT, WIDTH,
            '%.1f' % y, '%.1f' % y, LEFT - 6, '%.1f' % (y + 4),
            web.size_text(top * share) if share else '0'))
    for day, bar in sorted(bars.items()):
        x, y = LEFT + (day - month.first) * width, HEIGHT + 8
        for i, quantity in enumerate(bar):
            tall = HEIGHT * quantity / top
            y -= tall
            if quantity:
                parts.append(h(
                    '<rect class="part{}" x="{}" y="{}" width="{}" '
                    'height="{}"><title>{}</title></rect>', i % 6,
                    '%.1f' % (x + 1), '%.1f' % y, '%.1f' % (width - 2),
                    '%.1f' % tall, '%s, %s: %s' % (
                        day_text(day), words[i], web.size_text(quantity))))
    for day in range(month.first, month.after, 7):
        parts.append(h('<text x="{}" y="{}">{}</text>', '%.1f' % (
            LEFT + (day - month.first) * width), HEIGHT + BELOW + 4,
            day_text(day)[8:]))
    legend = web.join(h('<li class="part{}"><span>{}</span></li>', i % 6, word)
                      for i, word in enumerate(words))
    return h('<figure><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" '
             'role="img" aria-label="{}">{}</svg>{}</figure>', title, WIDTH,
             HEIGHT + BELOW + 10, '%s; the same figures are in the table '
             'below' % title, web.join(parts),
             h('<ul class="legend">{}</ul>', legend)
             if len(words) > 1 else '')


CHART_MACHINES = 5              # with a part of their own; others share one


def storage_chart(account, month, days):
    """What was stored on each day of a month, by machine."""
    names = {machine.number: machine.label
             for machine in account.machines()}
    total = collections.Counter()
    for _, machine, used, _ in days:
        total[machine] += used[0]
    shown = [machine for machine, _ in total.most_common(CHART_MACHINES)]
    shown.sort(key=lambda machine: names.get(machine, machine))
    words = [names.get(machine, machine) for machine in shown]
    if len(total) > len(shown):
        words.append('%d others' % (len(total) - len(shown)))
    bars = {}
    for day, machine, used, _ in days:
        bar = bars.setdefault(day, [0] * len(words))
        bar[shown.index(machine) if machine in shown else -1] += used[0]
    return chart('Stored on each day of ' + month.text, month, bars,
                 words or ['nothing'])


def traffic_chart(month, days):
    """What went up and down on each day of a month."""
    bars = {}
    for day, _, used, _ in days:
        bar = bars.setdefault(day, [0, 0])
        bar[0] += used[1]
        bar[1] += used[2]
    return chart('Sent on each day of ' + month.text, month, bars,
                 ['to the server', 'from the server'])


##############################################################################
# Pages
##############################################################################


def overview(site):
    """What one sees first: money, machines, and how to add one."""
    account = Account(site, site.account)
    return web.page(site, 'Your account', money_part(account),
                    machines_part(account), keygen_part(site))


def facts(pairs):
    """A list of names and values."""
    return h('<dl class="facts">{}</dl>', web.join(
        h('<div><dt>{}</dt><dd>{}</dd></div>', *pair) for pair in pairs))


def money_part(account):
    """Balance, how long it lasts, and what it costs."""
    site, balance, left = account.site, account.balance, account.left()
    pairs = []
    if site.prices:
        pairs = [('Balance', h('<strong>{}</strong>',
                               money_short(balance.money))),
                 ('Lasts', 'as long as nothing is stored' if left is None
                  else '%d days' % left),
                 ('Storage each month', money_short(
                     balance.held * site.prices.storage))]
    pairs += [('Stored', web.size_text(balance.held)),
              ('Charged up to', 'nothing yet' if account.billed is None
               else web.date(account.billed))]
    return web.join((facts(pairs), warning(account, left), add_money(site)))


def warning(account, left):
    """What is to be said of the money, if it is short."""
    if not account.site.prices or account.site.amnesty:
        return ''
    if account.balance.money <= 0:
        return h('<p class="alert" role="alert">Your balance is used up: '
                 'nothing can be stored or restored until you add money. '
                 'Deleting stays possible.</p>')
    if left is not None and left < tarsnapd.WARN_DAYS:
        return h('<p class="alert" role="alert">Your balance is used up in '
                 '{} days.</p>', left)
    return ''


def machines_part(account):
    """The machines, and which one has been silent."""
    machines = account.machines()
    if not machines:
        return h('<h2>Machines</h2><p>There is none yet.</p>')
    rows = [(h('<a href="machine.cgi?mid={}">{}</a>', machine.number,
               machine.label),
             '–' if machine.bytes is None else web.size_text(machine.bytes),
             last_backup(account, machine)) for machine in machines]
    return web.join((
        h('<h2>Machines</h2>'),
        web.table(('Machine', 'Stored', 'Last backup'), rows, numbers=(1,))))


def keygen_part(site):
    """How to add a machine, ready to copy."""
    server = site.conf.get('server', 'SERVER:PORT')
    command = ('tarsnap-keygen --keyfile /root/tarsnap.key --machine NAME '
               '\\\n    --server %s --user %s' % (
                   server, quoted(site.account['address'])))
    fingerprint = site.facts.get('fingerprint')
    if fingerprint:
        command += ' \\\n    --fingerprint ' + fingerprint
    return h(
        '<h2>Add a machine</h2><p>On the machine, with a name of your choice '
        'for NAME; it asks for the password of this account:</p>'
        '<pre tabindex="0"><code>{}</code></pre>'
        '<p>Keep a copy of the key file elsewhere: without it nobody can '
        'read the backups.</p>{}', web.join(
            h('{}\n', line) for line in command.split('\n')),
        h('<p>The fingerprint of the server is<br><code class="long">{}'
          '</code></p>', fingerprint) if fingerprint else '')


def quoted(word):
    """A word as a shell takes it for one."""
    safe = word.replace('@', '').replace('.', '').replace('-', '').replace(
        '_', '').replace('+', '')
    if safe.isascii() and safe.isalnum():
        return word
    return "'" + word.replace("'", "'\\''") + "'"


def last_backup(account, machine):
    """When a machine stored something last, with a warning if it should have
    since.
    """
    if machine.backup is None:
        return h('none up to {}', web.date(account.billed)) if (
            account.billed is not None) else 'not known yet'
    if not machine.silent:
        return web.date(machine.backup)
    return h('{} <strong class="late">silent for {} days{}</strong>',
             web.date(machine.backup), account.billed - machine.backup,
             ', usually {}'.format(machine.usual) if machine.usual else '')


def machine_find(account, number):
    """The Machine of that number; Problem if the account has none."""
    for machine in account.machines():
        if machine.number == number:
            return machine
    raise web.Problem('404 Not Found', 'No such machine',
                      'This account has no machine of that number.')


def activity_page(site):
    """A month, by day, and with view=machines by machine."""
    account = Account(site, site.account)
    month, query = Month(account), site.request.query
    verbose = query.get('view') == 'machines'
    if query.get('format') == 'csv':
        return activity_csv(account, month.first, month.last, verbose)
    days = account.view('days_of', month.first, month.last)
    other = h('<a href="activity.cgi?month={}{}">{}</a>', month.text,
              '' if verbose else Html('&amp;view=machines'),
              'All machines together' if verbose else 'Each machine')
    return web.page(
        site, 'Activity in ' + month.text,
        storage_chart(account, month, days), traffic_chart(month, days),
        month.links('activity.cgi', account, Html(
            '&amp;view=machines') if verbose else ''),
        h('<p class="links">{}</p>', other),
        activity_table(account, month.first, month.last, verbose))


def activity_table(account, first, last, verbose):
    """Rows as a table."""
    heads = ['', 'Date', *(['Machine'] if verbose else []), 'What',
             'Quantity', 'Amount', 'Balance']
    rows = [[row.rectype, web.date(row.day),
             *([row.machine] if verbose else []), kind_cell(row.type),
             '' if row.quantity == '' else '%d bytes' % row.quantity,
             '' if row.amount is None else money_fine(row.amount),
             '' if row.balance is None else money_short(row.balance)]
            for row in activity(account, first, last, verbose)]
    return web.table(heads, rows, 'Amounts in US dollars; days of UTC',
                     range(len(heads) - 3, len(heads)))


def machine_page(site):
    """One machine in one month."""
    account = Account(site, site.account)
    machine = machine_find(account, site.request.query.get('mid', ''))
    month = Month(account)
    if site.request.query.get('format') == 'csv':
        return machine_csv(account, machine.number, month.first, month.last)
    days = account.view('days_of', month.first, month.last, machine.number)
    return web.page(
        site, machine.label, facts([
            ('Number', h('<code>{}</code>', machine.number)),
            ('Stored', 'not known yet' if machine.bytes is None
             else web.size_text(machine.bytes)),
            ('Last backup', last_backup(account, machine)),
            ('Storage each month', money_short(
                (machine.bytes or 0) * site.prices.storage)
             if site.prices else 'free')]),
        storage_chart(account, month, days), traffic_chart(month, days),
        month.links('machine.cgi', account, h('&amp;mid={}',
                                              machine.number)),
        machine_table(account, machine, month.first, month.last))


def kind_cell(kind):
    """A kind of usage or money, on one line."""
    return h('<span class="kind">{}</span>', kind)


def money_fine(amount):
    """Attodollars with six digits, rounded down; CSV has them all."""
    sign, amount = '-' * (amount < 0), abs(amount)
    return '%s$%s' % (sign, money_text(amount)[:-12])


def machine_table(account, machine, first, last):
    return web.table(
        ('Date', 'What', 'Quantity', 'Amount'),
        [(web.date(day), kind_cell(kind), '%d bytes' % quantity,
          money_fine(amount)) for day, kind, quantity, amount
         in machine_rows(account, machine.number, first, last)],
        'Amounts in US dollars; days of UTC', (2, 3))


WORDS = {'payment': 'Payment', 'refund': 'Refund', 'credit': 'Credit',
         'chargeback': 'Taken back by the bank', 'adjustment': 'Adjustment',
         'reversal': 'Given back to you'}


def payments(site):
    """All that came and went but usage, with receipts."""
    account = Account(site, site.account)
    rows = [(web.date(when // tarsnapd.DAY), WORDS.get(kind, kind),
             reference(key), text, ('' if amount < 0 else '+')
             + money_short(amount),
             h('<a href="receipt.cgi?entry={}">Receipt</a>',
               reference(key)) if kind == 'payment' else '')
            for when, key, kind, amount, text
            in reversed(account.view('money'))]
    return web.page(
        site, 'Payments', facts([('Balance', h(
            '<strong>{}</strong>', money_short(account.balance.money)))]),
        add_money(site),
        web.table(('Date', 'What', 'Reference', 'Text', 'Amount', ''), rows,
                  numbers=(4,)) if rows else para('There are none yet.'))


def add_money(site):
    """A link to where one pays, if one can."""
    return h('<p class="links"><a href="pay.cgi">Add money</a></p>') if (
        site.can_pay()) else ''


def reference(key):
    """The name of an entry of money, which is its own among an account's.
    """
    return key.rpartition('/')[2]


def receipt(site):
    """What is to be printed of one payment."""
    account = Account(site, site.account)
    name = site.request.query.get('entry', '')
    for when, key, kind, amount, text in account.view('money'):
        if kind == 'payment' and reference(key) == name:
            return web.page(site, 'Receipt', facts([
                ('From', site.service), ('To', site.account['address']),
                ('Date', web.date(when // tarsnapd.DAY)), ('Reference', name),
                ('For', 'Prepaid usage of ' + site.service),
                ('Received', h('<strong>{}</strong>', money_short(amount))),
                *([('Text', text)] if text else [])]))
    raise web.Problem('404 Not Found', 'No such payment',
                      'This account has no payment of that reference.')


def export(site):
    """All that is kept of the account and its owner, as JSON; but what would
    let a reader log in.
    """
    import json
    account, run = Account(site, site.account), site.run
    ident = account.ident
    mails = [run(tarsnapd.summed_get(key)) for key in site.perform(
        ('list', 'mail/done/%s/' % ident))]
    found = {
        'account': [{name: value for name, value in version.items()
                     if name not in ('salt', 'stored')} for version in run(
                         tarsnapd.versions_all(tarsnapd.account_prefix(
                             ident)))],
        'machines': [{'number': machine.number, 'name': machine.name,
                      'bytes': machine.bytes} for machine
                     in account.machines()],
        'sessions': run(tarsnapd.export_sessions(ident)),
        'mails': mails,
        'money': [{'time': when, 'name': key, 'kind': kind,
                   'amount': amount, 'text': text}
                  for when, key, kind, amount, text
                  in account.view('money')],
        'usage': [{'day': day_text(day), 'machine': machine,
                   'stored': used[0], 'up': used[1], 'down': used[2],
                   'amount': sum(a * b for a, b in zip(used, prices))}
                  for day, machine, used, prices in account.view(
                      'days_of', 0, account.today)],
        'checkouts': run(tarsnapd.export_checkouts(ident)),
        'standing': run(tarsnapd.versions_all(
            tarsnapd.standing_prefix(ident)))}
    return web.Answer(json.dumps(found, indent=1, ensure_ascii=False) + '\n',
                      'application/json', headers=[(
                          'Content-Disposition',
                          'attachment; filename="account.json"')])


def moment(seconds):
    """A time of UTC, to the minute."""
    return tarsnapd.moment(seconds)[:16]


def home(site):
    """What this is, what it costs, and whether it works."""
    if site.prices:
        price = facts([
            ('Storage', '%s dollars a gigabyte-month'
             % picodollars(site.prices.storage)),
            ('Upload', '%s dollars a gigabyte' % picodollars(
                site.prices.up)),
            ('Download', '%s dollars a gigabyte' % picodollars(
                site.prices.down))])
    else:
        price = para('Nobody pays here.')
    return web.page(
        site, site.service, h(
            '<p class="lead">Backups that nobody but you can read. Your '
            'machines seal everything before it leaves them, and only their '
            'key files open it.</p>'),
        status(site), h('<h2>Prices</h2>'), price,
        para('A gigabyte is 10<sup>9</sup> bytes of what is left after '
             'deduplication and compression. There is no monthly fee: you '
             'pay in advance for what you use, to the byte and the day.')
        if site.prices else '',
        h('<h2>How to begin</h2><ol>'
          '<li><a href="register.cgi">Register</a> with your mail address.'
          '</li>{}<li>Make a key on each machine with <code>tarsnap-keygen'
          '</code>; your account shows the command.</li>'
          '<li>Keep copies of the key files elsewhere, and back up with '
          '<code>tarsnap</code>.</li></ol>',
          h('<li>Add money to your account.</li>') if site.prices else ''))


STATUS_OLD = 3600               # seconds after which a check says nothing


def status(site):
    """Whether the service works, by what the operator's last check said; ''
    where none is made.
    """
    try:
        with open(site.file('status'), encoding='utf-8') as file:
            words = file.read(100).split()
            when = int(os.fstat(file.fileno()).st_mtime)
    except (OSError, UnicodeDecodeError):
        return ''
    at = h('<time>{}</time> UTC', moment(when))
    if not words:                   # it is being written
        return ''
    if when < site.now - STATUS_OLD:
        text = h('Whether it works has not been looked at since {}.', at)
    elif words[1:2] in (['OK'], ['WARNING']):
        text = h('It works: a block was written, read and deleted at {}.', at)
    else:
        text = h('There is trouble, seen at {}. Backups that fail now can be '
                 'repeated later.', at)
    return h('<h2>Status</h2><p role="status">{}</p>', text)


def picodollars(price):
    """Attodollars a byte as dollars a gigabyte."""
    text = money_text(price * 10 ** 9).rstrip('0')
    return text + '00'[:max(0, 2 - len(text.partition('.')[2]))]


##############################################################################
# Programs
##############################################################################


# What programs that watch an account look for, word by word.
NO_USER = 'No user exists with the provided email address; please try again.'
NO_PASSWORD = 'Password is incorrect; please try again.'
PROGRAM_MONTHS = 3              # with this one, unless they say since when


def program(site, address, password):
    """What a program asked for, with address and password.

    They expect a page where they are refused, and tell by these sentences;
    who may try how often is counted as for everybody.
    """
    site.account = site.session = None
    form = dict(site.request.query, **site.request.form)
    found, known = site.login(address, password)
    if found is None:
        return web.page(site, 'Not logged in', para(
            NO_PASSWORD if known else NO_USER))
    account = Account(site, found)
    act, last = form.get('action', ''), account.today
    first = account.today + 1
    for _ in range(PROGRAM_MONTHS):
        first, _ = tarsnapd.month_days(first - 1)
    if 'since' in form:
        try:
            first = min(tarsnapd.day_parse(form['since']), last)
        except web.ServerError as e:
            raise web.bad('%s.' % e) from None
    machine = None
    if act == 'subactivity':
        machine = machine_find(account, form.get('mid', ''))
    elif act not in ('', 'activity', 'verboseactivity'):
        raise web.bad('There is no such action.')
    if form.get('format') == 'csv' and act:
        if machine:
            return machine_csv(account, machine.number, first, last)
        return activity_csv(account, first, last, act == 'verboseactivity')
    if machine:
        return web.page(site, machine.label,
                        machine_table(account, machine, first, last))
    if act:
        return web.page(site, 'Activity', activity_table(
            account, first, last, act == 'verboseactivity'))
    return web.page(site, 'Your account', money_part(account),
                    machines_part(account))
