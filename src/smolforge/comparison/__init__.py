"""Runs side by side: what they measured, as a table, as figures, as one page.

folders -> selection -> a history of each run -> table                lines of text
                                              -> figures              SVG and PNG
                                              -> page, of all these   index.html
"""
