#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Closes the account."""

import web


def post(site):
    site.confirm()
    site.run(web.tarsnapd.account_close(site.account['address']))
    for place, _ in site.sessions(site.account):
        site.perform(('delete', place))
    site.cookie('session', '')
    site.account = site.session = None
    return web.page(site, 'Your account is closed', web.para(
        'Nobody can log in to it from now on.'))


def get(site):
    return web.redirect('settings.cgi')


web.serve(get, post)
