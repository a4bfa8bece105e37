#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Where one logs in; the form goes to manage.cgi."""

import web


def get(site):
    if site.account:
        return web.redirect('manage.cgi')
    return web.page(
        site, 'Log in',
        web.form(site, 'manage.cgi',
                 web.field('Mail address', 'address', 'email',
                           complete='username'),
                 web.field('Password', 'password', 'password',
                           complete='current-password'),
                 button='Log in'),
        web.h('<p><a href="forgot.cgi">Forgot your password?</a></p>'
              '<p>No account yet? <a href="register.cgi">Register</a>.</p>'))


web.serve(get, login=False)
