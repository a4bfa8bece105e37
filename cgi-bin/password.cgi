#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Changes the password; every other session ends."""

import web


def post(site):
    password = site.password()
    site.confirm()
    site.run(web.tarsnapd.password_change(site.post, site.found, password))
    account = site.run(web.tarsnapd.account_load(site.account['id']))[1]
    site.session_start(account)
    return web.redirect('settings.cgi')


def get(site):
    return web.redirect('settings.cgi')


web.serve(get, post)
