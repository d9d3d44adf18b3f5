"""Helpers of the tests, in one place: small inputs, stand-ins, servers, and processes that tests start."""
