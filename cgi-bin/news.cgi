#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Whether announcements are mailed."""

import web


def post(site):
    site.run(web.tarsnapd.account_write(
        site.found, news=site.request.form.get('news') == 'on' or None))
    return web.redirect('settings.cgi')


def get(site):
    return web.redirect('settings.cgi')


web.serve(get, post)
