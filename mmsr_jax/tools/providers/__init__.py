"""Search services, one a file: their requests, their answers, their prices."""
