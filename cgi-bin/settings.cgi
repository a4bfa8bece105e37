#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What the owner of an account may change."""

import figures
import web
from web import h, para


def get(site):
    account = site.account
    current = [web.join((web.owner(account['address']), web.field(
        'Password of this account', 'password', 'password',
        'current-password', ident='password%d' % i))) for i in range(3)]
    rows = [(figures.moment(session['time']),
             h('<span class="agent">{}</span>', session['agent'] or '–'),
             session['address'],
             'this one' if place == site.session else '')
            for place, session in site.sessions(account)]
    return web.page(
        site, 'Settings',
        h('<section><h2>Address</h2>'), web.form(
            site, 'address.cgi', para('Mail goes to <strong>{}</strong>.',
                                      account['address']),
            web.field('New mail address', 'address', 'email',
                      complete='email'), current[0],
            button='Mail a link to the new address'),
        h('</section><section><h2>Password</h2>'), web.form(
            site, 'password.cgi', current[1],
            web.password_fields(account['address']),
            button='Change the password'),
        h('</section><section><h2>News</h2>'), web.form(
            site, 'news.cgi', para('Announcements are {}mailed to you.',
                                   '' if account.get('news') else 'not '),
            hidden=[('news', 'off' if account.get('news') else 'on')],
            button='Send me no more' if account.get('news')
            else 'Send me news'),
        h('</section><section><h2>Sessions</h2>'),
        web.table(('Since', 'Browser', 'From', ''), rows),
        web.form(site, 'sessions.cgi', button='Log out everywhere'),
        h('</section><section><h2>Your data</h2>'),
        para('<a href="export.cgi">All that is kept of you</a>, as JSON. '
             'What your machines stored only their keys can read.'),
        h('</section><section><h2>Close the account</h2>'), web.form(
            site, 'close.cgi',
            para('Nobody can log in and no machine can be added afterwards. '
                 'What is stored stays until its machine deletes it or it is '
                 'not paid for; a balance that is left is paid back on '
                 'request only.'), current[2],
            button='Close this account', kind='plain danger'),
        h('</section>'))


web.serve(get)
