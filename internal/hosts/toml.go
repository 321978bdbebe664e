package hosts

import (
	"errors"
	"fmt"

	"github.com/pelletier/go-toml/v2/unstable"
)

// table is a TOML table. Its values are strings, bools, []any and tables; of
// other kinds, which a hosts.toml has no use for, are nil.
type table map[string]any

// maxDepth bounds how tables and lists are nested.
const maxDepth = 16

// parseTOML returns the tables of b and the keys below "host" in their order.
//
// It reads the parser's expressions, as a decoder into Go types would neither
// tell their order nor stay small: boot carries this.
func parseTOML(b []byte) (table, []string, error) {
	var (
		p     unstable.Parser
		root  = table{}
		here  = root
		order []string
		err   error
	)
	p.Reset(b)
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table:
			path := keyOf(e)
			if here, err = root.below(path); err != nil {
				return nil, nil, err
			}
			if len(path) > 1 && path[0] == "host" {
				order = append(order, path[1])
			}
		case unstable.ArrayTable: // a hosts.toml has none that mean something
			here = table{}
		case unstable.KeyValue:
			if err := here.set(e, 0); err != nil {
				return nil, nil, err
			}
		}
	}
	return root, order, p.Error()
}

func keyOf(n *unstable.Node) []string {
	var path []string
	for it := n.Key(); it.Next(); {
		path = append(path, string(it.Node().Data))
	}
	return path
}

// below returns the table at path, which it makes where it is missing.
func (t table) below(path []string) (table, error) {
	if len(path) > maxDepth {
		return nil, errors.New("it is nested too deeply")
	}
	for _, key := range path {
		next, ok := t[key].(table)
		if t[key] != nil && !ok {
			return nil, fmt.Errorf("%q is no table", key)
		}
		if !ok {
			next = table{}
			t[key] = next
		}
		t = next
	}
	return t, nil
}

// set enters a key with its value.
func (t table) set(n *unstable.Node, depth int) error {
	path := keyOf(n)
	last := len(path) - 1
	t, err := t.below(path[:last])
	if err != nil {
		return err
	}
	if _, ok := t[path[last]]; ok {
		return fmt.Errorf("%q stands twice", path[last])
	}
	t[path[last]], err = valueOf(n.Value(), depth)
	return err
}

func valueOf(n *unstable.Node, depth int) (any, error) {
	if depth > maxDepth {
		return nil, errors.New("it is nested too deeply")
	}
	switch n.Kind {
	case unstable.String:
		return string(n.Data), nil
	case unstable.Bool:
		return string(n.Data) == "true", nil
	case unstable.Array:
		list := []any{}
		for it := n.Children(); it.Next(); {
			v, err := valueOf(it.Node(), depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		return list, nil
	case unstable.InlineTable:
		in := table{}
		for it := n.Children(); it.Next(); {
			if err := in.set(it.Node(), depth+1); err != nil {
				return nil, err
			}
		}
		return in, nil
	}
	return nil, nil
}
