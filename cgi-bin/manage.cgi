#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The account: what it has, what it costs, which machines; and logging in.

Also what programs ask for with address and password in each request: then
nothing is remembered, and no cookie is looked at.
"""

import figures
import web
from web import h


def get(site):
    if not site.account:
        return web.redirect('account.html')
    return figures.overview(site)


def post(site):
    form = site.request.form
    address, password = form.get('address', ''), form.get('password', '')
    if 'token' not in form:
        return figures.program(site, address, password)
    site.token_check()
    account, _ = site.login(address, password)
    if account is None:
        return web.page(
            site, 'Not logged in', h(
                '<p>There is no account with this address and this password.'
                '</p><p><a href="account.html">Try again</a>, or <a href='
                '"forgot.cgi">ask for a new password</a>.</p>'),
            status='403 Forbidden')
    site.session_start(account)
    return web.redirect('manage.cgi')


web.serve(get, post, login=False, token=False)
