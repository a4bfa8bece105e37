#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What a link in a mail leads to.

Looking at it changes nothing, as programs that read mail look at all links.
"""

import web
from web import para

WHAT = {
    'join': ('Your account', 'Choose a password for <strong>{}</strong>.',
             'Make the account'),
    'reset': ('A new password', 'Choose a new password for '
              '<strong>{}</strong>.', 'Set the password'),
    'move': ('Your new address', 'From now on your account is to have the '
             'address <strong>{}</strong>.', 'Change the address'),
    'leave': ('No more news', 'No more announcements are to go to '
              '<strong>{}</strong>.', 'Send me no more')}
DONE = {
    'join': 'Your account <strong>{}</strong> is there.',
    'reset': 'The password of <strong>{}</strong> was changed.',
    'move': 'Your account has the address <strong>{}</strong> now.',
    'leave': 'No more announcements go to <strong>{}</strong>.'}


def read(site, token):
    """(what the link says, the address it is about); Problem if it is not
    good.
    """
    try:
        what, found = site.run(web.tarsnapd.link_read(token))
    except web.ServerError as e:
        raise web.Problem('410 Gone', 'This link is not good', '%s.' % (
            str(e).capitalize())) from None
    return what, what.get('address') or found[1]['address']


def get(site):
    token = site.request.query.get('link', '')
    what, address = read(site, token)
    title, text, button = WHAT[what['kind']]
    return web.page(site, title, para(text, address), web.form(
        site, 'confirm.cgi',
        web.password_fields(address) if what['kind'] in ('join', 'reset')
        else '',
        button=button, hidden=[('link', token)]))


def post(site):
    token = site.request.form.get('link', '')
    what, _ = read(site, token)
    password = None
    if what['kind'] in ('join', 'reset'):
        password = site.password()
    try:
        address = site.run(web.tarsnapd.link_use(site.post, token, password))
    except web.ServerError as e:            # somebody was faster
        raise web.Problem('409 Conflict', 'That did not work',
                          'It was not done: %s.' % e) from None
    return web.page(site, WHAT[what['kind']][0],
                    para(DONE[what['kind']], address),
                    para('<a href="account.html">Log in</a>'))


web.serve(get, post, login=False)
