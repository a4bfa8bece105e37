# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""figures: what an account has, used and paid, as pages, charts and CSV.

All of it is of the view of the ledger that web.History keeps.  A day is one
of UTC; amounts are attodollars until they are shown.
"""

import web                      # which knows where tarsnapd.py is
from web import h, tarsnapd

day_text, money_text = tarsnapd.day_text, tarsnapd.money_text
money_short = tarsnapd.money_short

# Kinds of usage, as programs know them, in the order of a day.
TYPES = ('Daily storage', 'Client->Server bandwidth',
         'Server->Client bandwidth')
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
        self.balance = site.balance(account)
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
                                         3 * (machine.usual or 2))


##############################################################################
# Pages
##############################################################################


def overview(site):
    """What one sees first: money, machines, and how to add one."""
    account = Account(site, site.account)
    return web.page(site, 'Your account', money_part(account),
                    machines_part(account))


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
              ('Charged until', 'nothing yet' if account.billed is None
               else 'the end of ' + day_text(account.billed))]
    return web.join((facts(pairs), warning(account, left)))


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
               machine.name or machine.number),
             '–' if machine.bytes is None else web.size_text(machine.bytes),
             last_backup(account, machine)) for machine in machines]
    return web.join((
        h('<h2>Machines</h2>'),
        web.table(('Machine', 'Stored', 'Last backup'), rows, numbers=(1,))))


def last_backup(account, machine):
    """When a machine stored something last, with a warning if it should have
    since.
    """
    if machine.backup is None:
        return 'none until ' + day_text(account.billed) if (
            account.billed is not None) else 'not known yet'
    if not machine.silent:
        return day_text(machine.backup)
    return h('{} <strong class="late">silent for {} days{}</strong>',
             day_text(machine.backup), account.billed - machine.backup,
             ', usually {}'.format(machine.usual) if machine.usual else '')


def home(site):
    """What this is, what it costs, and whether it works."""
    if site.prices:
        price = facts([
            ('Storage', '%s dollars a gigabyte and month'
             % picodollars(site.prices.storage)),
            ('Upload', '%s dollars a gigabyte' % picodollars(
                site.prices.up)),
            ('Download', '%s dollars a gigabyte' % picodollars(
                site.prices.down))])
    else:
        price = h('<p>Nobody pays here.</p>')
    return web.page(site, site.service, h(
        '<p class="lead">Backups that nobody but you can read. Your machines '
        'seal everything before it leaves them.</p>'), h('<h2>Prices</h2>'),
        price)


def picodollars(price):
    """Attodollars a byte as dollars a gigabyte."""
    text = money_text(price * 10 ** 9).rstrip('0')
    return text + '00'[:max(0, 2 - len(text.partition('.')[2]))]


##############################################################################
# Programs
##############################################################################


def program(site, address, password):
    """What a program asked for, with address and password."""
    raise web.bad('Not yet.')
