"""Where the library meets others: each module needs its own package, and nothing else imports them."""
