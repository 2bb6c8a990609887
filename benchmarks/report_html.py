"""placeholder"""


def html(comparison):
    return "<html></html>"
