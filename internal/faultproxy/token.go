package faultproxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
)

// tokens is the token server of a registry.
type tokens struct {
	user, password string
	uses           int
	expired        int // status that an expired token gets

	mu     sync.Mutex
	issued int
	valid  map[string]int // token → uses left
}

// RequireToken makes the proxy ask for a bearer token, which its own token
// server gives to user with password. A token expires after uses requests;
// then the proxy answers with the given status: 401, or 403 as some do.
func (p *Proxy) RequireToken(user, password string, uses, expired int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tokens = &tokens{user: user, password: password, uses: uses, expired: expired, valid: make(map[string]int)}
}

// TokensIssued returns how many tokens the token server has given.
func (p *Proxy) TokensIssued() int {
	p.mu.Lock()
	t := p.tokens
	p.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.issued
}

// admit answers the request itself unless it has a valid token.
func (t *tokens) admit(w http.ResponseWriter, r *http.Request) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.URL.Path == "/token" {
		if user, password, ok := r.BasicAuth(); !ok || user != t.user || password != t.password {
			w.WriteHeader(http.StatusUnauthorized)
			return false
		}
		t.issued++
		token := fmt.Sprintf("token-%d", t.issued)
		t.valid[token] = t.uses
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]string{"token": token})
		return false
	}
	token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if t.valid[token] > 0 {
		t.valid[token]--
		return true
	}
	if bearer && t.expired == http.StatusForbidden {
		w.WriteHeader(http.StatusForbidden)
		return false
	}
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s://%s/token",service="registry"`, scheme, r.Host))
	w.WriteHeader(http.StatusUnauthorized)
	return false
}
